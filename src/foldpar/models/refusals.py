"""What general tools would do to a folded model as if every rank had all of it: refused, with the call to use instead.

Most of them see DTensors and do the right thing, or refuse by themselves. These few need a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from foldpar.comm import FoldedGroups
from foldpar.errors import ModelError

__all__ = ["refuse_what_needs_all_ranks"]


def refuse_what_needs_all_ranks(model: nn.Module, groups: FoldedGroups) -> None:
    """Refuse ``DistributedDataParallel``, ``save_pretrained`` and, over lanes, resizing, before they touch anything."""
    if groups.layout.world == 1:
        return
    instead: dict[str, str] = {
        "save_pretrained": "it would write what one rank holds; foldpar.hf.export(model, folder, groups), called on "
        "every rank, writes the whole model as transformers does",
        "push_to_hub": "it would upload what one rank holds; export with foldpar.hf.export(model, folder, groups) and "
        "upload the folder",
    }
    if groups.layout.tp > 1:
        instead["resize_token_embeddings"] = (
            "rows of the vocabulary lie on different lanes now; resize the embeddings before fold_model"
        )
    for module in model.modules():  # a model with a head has another one inside
        for name, reason in instead.items():
            if hasattr(module, name):
                setattr(module, name, _Refusal(name, reason))
    # The first thing that DistributedDataParallel asks of a module; it must have no type of its own there.
    model._ddp_params_and_buffers_to_ignore = _Refusal(  # type: ignore[assignment]
        "DistributedDataParallel",
        "it would copy the parameters of rank 0 onto all ranks and average what belongs to different parameters; call "
        "the model as it is and foldpar.reduce_gradients(model, groups) after backward, or shard it with "
        "foldpar.shard_model(model, groups, stage=1)",
    )


@dataclass(frozen=True)
class _Refusal:
    """In place of a method, or of a collection that a tool reads."""

    tool: str
    reason: str

    def __call__(self, *args: Any, **options: Any) -> NoReturn:
        raise ModelError(f"{self.tool} cannot be used on a folded model: {self.reason}.")

    def __iter__(self) -> Iterator[str]:
        self()
