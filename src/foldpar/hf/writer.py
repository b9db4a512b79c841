"""``export``: a folded model as Hugging Face's files, under the names and shapes that they have on the hub."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foldpar.comm import FoldedGroups, Ranks, communication_device
from foldpar.errors import CheckpointError
from foldpar.hf.names import Overlap, hub_shapes, is_transformers_model, lay_out, overlaps, plain_class
from foldpar.hf.weight_files import (
    BUFFER_BYTES,
    SHARD_BYTES,
    ExportReport,
    Given,
    WholeTensor,
    of_the_world,
    write_files,
)
from foldpar.parameters import held_tensors

__all__ = ["ExportReport", "export"]


def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    groups: FoldedGroups,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    buffer_bytes: int = BUFFER_BYTES,
) -> ExportReport:
    """Write a folded model to a folder that transformers, and whatever reads the hub's files, can load.

    Tensors have the names, shapes and dtypes that ``save_pretrained`` would give them: a tensor per expert where the
    family's files on the hub are like that. ``config.json`` comes with them; a tokenizer does not. No rank holds more
    than its share and a buffer. Call it on every rank; the folder must be the same, shared one on all of them, and the
    files are written by all ranks in turn. Sharding by :func:`foldpar.shard_model` may be on or off::

        foldpar.hf.export(model, "runs/final", groups)
        model = AutoModelForCausalLM.from_pretrained("runs/final")

    Files get their names when all are complete, the index last. An export that fails removes what it wrote.

    Args:
        max_shard_bytes: how large a file may be; a single tensor may be larger.
        buffer_bytes: how much is assembled at a time, on every rank, where it communicates.

    Raises:
        CheckpointError: the folder holds weights already, parts of tensors have no owner, tensors are on the meta
            device or of a dtype that the format does not know, or the disk failed. ModelError, FamilyError: as
            :func:`foldpar.hf.import_`. All on every rank, before anything is written, but for a disk that fails.

    Source: safetensors' format; transformers' ``conversion_mapping``.
    """
    folder = Path(folder)
    ranks = Ranks.of(groups, f"exporting to {folder}")
    plan = of_the_world(ranks.together(lambda: _plan(model, groups)), ranks, groups.layout.pp)
    return write_files(
        folder,
        plan,
        groups,
        ranks,
        max_shard_bytes=max_shard_bytes,
        buffer_bytes=buffer_bytes,
        beside=lambda pages: _save_config(model, pages),
    )


def _plan(model: nn.Module, groups: FoldedGroups) -> Given:
    _check_no_adapters(model)
    held = held_tensors(model, groups)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    held = {name: each for name, each in held.items() if name not in ignored}
    for each in held.values():
        if each.tensor.is_meta:
            raise CheckpointError(f"{each.name} is on the meta device and has no values to export. Load some first.")
    shapes = {name: each.share.shape for name, each in held.items()}
    stored = hub_shapes(model, shapes)
    names = lay_out(model, stored, shapes)
    wrong = [name for name in shapes if name not in names.laid or names.laid[name].shape != shapes[name]]
    if wrong or names.unused or names.problems:
        raise CheckpointError(
            f"transformers' conversion of {type(model).__name__} does not lead back from the files' names to the "
            f"model's for {', '.join([*wrong, *names.unused, *names.problems][:5])}, so nothing was written."
        )
    gives: dict[str, list[tuple[Tensor, Overlap]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, each in held.items():
        tensor = each.local(each.tensor).detach()
        for piece in names.laid[name].pieces:
            dtypes[piece.source] = tensor.dtype
        if each.first:
            for overlap in overlaps(each.share, names.laid[name]):
                gives.setdefault(overlap.source, []).append((tensor, overlap))
    tensors = {name: WholeTensor(name, tuple(shape), dtypes[name]) for name, shape in stored.items()}
    device = communication_device(next(iter(held.values())).tensor) if held else torch.device("cpu")
    return Given(tensors, {name: tuple(parts) for name, parts in gives.items()}, device)


def _check_no_adapters(model: nn.Module) -> None:
    """Names of adapters, and of what they wrap, are known to nobody who reads the files."""
    adapted = next((name for name, module in model.named_modules() if hasattr(module, "merged_adapters")), None)
    if adapted is not None:
        raise CheckpointError(
            f"{adapted} has an adapter beside its weights, and no reader of the files knows their names. Merge "
            f"adapters first, and export what is left: export(model.merge_and_unload(), ...). The adapters alone are "
            f"saved by the adapted model's own save_pretrained. Nothing was written."
        )
    inner = next((name for name, module in model.named_modules() if is_transformers_model(module)), "")
    if inner:
        raise CheckpointError(
            f"{type(model).__name__} wraps the model {inner}, so its tensors would have names that no reader of the "
            f"files knows. Export that one: export(model.{inner}, ...). Nothing was written."
        )


def _save_config(model: nn.Module, folder: Path) -> None:
    if not is_transformers_model(model):
        return
    config: Any = copy.deepcopy(model.config)
    config.architectures = [plain_class(model).__name__]
    config.dtype = next(model.parameters()).dtype
    config.save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
