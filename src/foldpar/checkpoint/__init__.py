"""Training state in files, written in one layout and read in any other.

    save, load     save_checkpoint, load_checkpoint; ``pending``: saves in the background
    agreement      what the ranks must have in common; ``copies``: replicas compared
    state          what there is to save; ``values``, ``schedulers``: what is no tensor
    matching       which piece of which file makes up what a rank holds
    manifest       the page that says what a checkpoint holds, sealed with sums
    files          folders, locks, sums, latest_checkpoint
    dcp, metadata  torch.distributed.checkpoint, and a reader of its index that runs nothing

Laws: a checkpoint is whole or is not there; what is loaded equals what was saved bit by bit; no file runs code.
"""

from __future__ import annotations

from foldpar.checkpoint.files import latest_checkpoint
from foldpar.checkpoint.load import CheckpointInfo, load_checkpoint
from foldpar.checkpoint.optimizers import check_optimizer
from foldpar.checkpoint.pending import PendingSave
from foldpar.checkpoint.save import save_checkpoint

__all__ = [
    "CheckpointInfo",
    "PendingSave",
    "check_optimizer",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]
