"""Training state in files, written in one layout and read in any other.

    save_and_load  save_checkpoint, load_checkpoint, latest_checkpoint
    state          what there is to save; ``values``, ``schedulers``: what is no tensor
    matching       which piece of which file makes up what a rank holds
    manifest       the page that says what a checkpoint holds, sealed with sums
    files          folders, locks, sums; ``pending``: saves in the background; ``copies``: replicas compared
    dcp, metadata  torch.distributed.checkpoint, and a reader of its index that runs nothing

Laws: a checkpoint is whole or is not there; what is loaded equals what was saved bit by bit; no file runs code.
"""

from __future__ import annotations

from foldpar.checkpoint.optimizers import check_optimizer
from foldpar.checkpoint.save_and_load import (
    CheckpointInfo,
    PendingSave,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

__all__ = [
    "CheckpointInfo",
    "PendingSave",
    "check_optimizer",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]
