"""``import_``: Hugging Face's files into a folded model, each rank reading only what it holds.

    rank 0 reads the files' headers -> every rank: names -> boxes -> check -> materialise, slice, copy

Nothing but headers is read before everything is known to fit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from foldpar.comm import FoldedGroups, Ranks, attempt, raise_interruption, told
from foldpar.errors import CheckpointError, ModelError
from foldpar.hf.files import Stored, read_folder
from foldpar.hf.materialise import Slots, compute_buffers
from foldpar.hf.names import Names, Overlap, lay_out, overlaps
from foldpar.parameters import Held, held_tensors, kept_dtype, mark_replaced
from foldpar.wording import below, some

__all__ = ["ImportReport", "NameRule", "fill", "import_"]

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What was read.

    Attributes:
        tensors: how many tensors of the model were filled, in part or whole, on this rank.
        bytes_read: what this rank read of the files.
        bytes_stored: what the files hold.
        unused: tensors of the files that are in no tensor of the model, on any rank.
        missing: tensors of the model that the files do not hold, which kept their values (``strict=False``).
    """

    tensors: int
    bytes_read: int
    bytes_stored: int
    unused: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        rest = "".join(
            f"; {len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
            for what, names in (("unused", self.unused), ("missing", self.missing))
            if names
        )
        share = self.bytes_read / self.bytes_stored if self.bytes_stored else 1.0
        return (
            f"{self.tensors} tensors, {self.bytes_read:,} of {self.bytes_stored:,} bytes ({share:.0%}) read here{rest}"
        )


def import_(
    model: nn.Module,
    folder: str | os.PathLike[str],
    groups: FoldedGroups,
    *,
    strict: bool = True,
    device: torch.device | str | None = None,
) -> ImportReport:
    """Fill a folded model from a folder of safetensors files, as ``save_pretrained`` or the hub has it.

    Each rank reads only the slices that make up its share, straight into place: it never holds more than its share and
    the slice at hand. Tensors on the meta device get memory one by one, when their turn comes, so a model of any size
    can be built, folded and filled on ranks that hold a part of it::

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        foldpar.fold_model(model, groups)
        foldpar.hf.import_(model, folder, groups)

    Names are those of the files: where they hold a tensor per expert (``experts.3.up_proj.weight``), transformers' own
    conversion of the family says where it belongs. Values take the dtype of the model, but for what its class keeps in
    float32 (``_keep_in_fp32_modules``), as ``from_pretrained`` does. Call it on every rank; the
    folder must be readable on all. It works before and after :func:`foldpar.shard_model`; before it, a rank holds its
    share of the folded model whole.

    Args:
        model: folded, on the meta device or not; a tied parameter is read once, under any of its names.
        folder: holds ``model.safetensors``, or ``model.safetensors.index.json`` and the files that it names.
        strict: raise if the files hold tensors that are not in the model, or lack some that are, apart from those that
            the model's class says may be. ``False``: those that are missing keep their values.
        device: where meta tensors get their memory; by default where the ranks communicate, on the GPU or the CPU.
            Buffers that are in no file, such as rotary frequencies, are computed anew.

    Raises:
        CheckpointError: no files, damaged or quantised ones; tensors that are missing, not known or of another shape,
            all in one error. ModelError: the family's files are converted in a way that is not known here, or a buffer
            cannot be computed. FamilyError: see :func:`foldpar.parameter_families`. All on every rank, before anything
            is touched, but for a file that cannot be read after its header could.

    Source: safetensors' format; transformers' ``conversion_mapping``.
    """
    return fill(model, Path(folder), groups, strict=strict, device=device, names=lay_out)


NameRule = Callable[[nn.Module, Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]], Names]


def fill(
    model: nn.Module,
    folder: Path,
    groups: FoldedGroups,
    *,
    strict: bool,
    device: torch.device | str | None,
    names: NameRule,
    file: str | None = None,
) -> ImportReport:
    """Fill a model from a folder, or one ``file`` of it, by a rule that says which names make up the model's tensors.

    Raises:
        CheckpointError, ModelError, FamilyError: see :func:`import_`.
    """
    ranks = Ranks.of(groups, f"importing {folder / (file or '')}")
    stored = _headers(folder, file, ranks)
    plan = ranks.together(lambda: _plan(model, groups, stored, strict, names))
    unused = _check_fits(plan, folder, ranks, strict)
    slots = ranks.together(lambda: Slots(model, torch.device(device) if device is not None else _device(groups)))
    before = list(model.parameters())
    read, error = attempt(lambda: _fill(model, folder, stored, plan, slots))
    mark_replaced(before, model)
    errors = ranks.all_gather(None if error is None else f"{type(error).__name__}: {error}")
    raise_interruption(error)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
    if failed:
        raise (type(error) if isinstance(error, ModelError) else CheckpointError)(
            f"Reading {folder} failed on {len(failed)} rank(s), {failed[0]} The model is in an undefined state, with "
            f"some tensors loaded and some not."
        ) from error
    return ImportReport(len(plan.reads), read or 0, stored.bytes, unused, plan.missing)


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What this rank reads, by the name of the model's tensor, and what does not fit."""

    held: Mapping[str, Held]
    reads: Mapping[str, tuple[Overlap, ...]]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    problems: tuple[str, ...]


def _headers(folder: Path, file: str | None, ranks: Ranks) -> Stored:
    """Read on rank 0, known to all."""
    value, error = attempt(lambda: read_folder(folder, file)) if ranks.rank == 0 else (None, None)
    stored, text = ranks.all_gather((value, None if error is None else told(error)))[0]
    raise_interruption(error)
    if stored is None:
        raise CheckpointError(f"{text} Nothing was loaded.") from error
    return stored


def _plan(model: nn.Module, groups: FoldedGroups, stored: Stored, strict: bool, rule: NameRule) -> _Plan:
    held = held_tensors(model, groups)
    wanted = {name: each.share.shape for each in held.values() for name in (each.name, *each.aliases)}
    names = rule(model, {name: each.shape for name, each in stored.tensors.items()}, wanted)
    reads: dict[str, tuple[Overlap, ...]] = {}
    missing, problems = [], list(names.problems)
    for each in held.values():
        found = next((name for name in (each.name, *each.aliases) if name in names.laid), None)
        if found is None:
            missing.append(each.name)
        elif names.laid[found].shape != each.share.shape:
            sources = [piece.source for piece in names.laid[found].pieces]
            problems.append(
                f"{each.name} is {list(each.share.shape)} in the model and {list(names.laid[found].shape)} in the "
                f"files ({some(sources, 1)})"
            )
        else:
            reads[each.name] = tuple(overlaps(each.share, names.laid[found]))
    failed = {problem.partition(":")[0] for problem in names.problems}
    may_lack = _patterns(model, "_keys_to_ignore_on_load_missing") if strict else re.compile("")
    for name in missing:
        if name not in failed and (held[name].tensor.is_meta or not may_lack.search(name)):
            hint = " and has no values yet, being on the meta device" if held[name].tensor.is_meta else ""
            problems.append(f"{name} is missing in the files{hint}")
    ignored = _patterns(model, "_keys_to_ignore_on_load_unexpected", r"rotary_emb\.inv_freq$")
    unused = tuple(name for name in names.unused if not ignored.search(name))
    return _Plan(held, reads, unused, tuple(missing), tuple(problems))


def _patterns(model: nn.Module, attribute: str, *more: str) -> re.Pattern[str]:
    """What a model's class says may be missing or superfluous."""
    return re.compile("|".join(f"(?:{each})" for each in (*(getattr(model, attribute, None) or ()), *more)) or r"\Z.")


def _check_fits(plan: _Plan, folder: Path, ranks: Ranks, strict: bool) -> tuple[str, ...]:
    """Raise one error for all ranks and all tensors; returns what no rank uses."""
    of_all = ranks.all_gather((plan.problems, plan.unused))
    problems = list(dict.fromkeys(problem for found, _ in of_all for problem in found))
    # A pipeline stage leaves what is of other stages.
    unused = tuple(name for name in of_all[0][1] if all(name in set(names) for _, names in of_all[1:]))
    if strict:
        problems += [f"{name} is in the files and not in the model" for name in unused]
    if problems:
        listed = below(problems, 20, indent=2)
        lenient = (
            "\nIf that is meant, strict=False leaves superfluous tensors out and lets missing ones keep their values."
            if strict
            else ""
        )
        raise CheckpointError(f"{folder} does not fit the model. Nothing was loaded.{listed}{lenient}")
    return unused


@torch.no_grad()
def _fill(model: nn.Module, folder: Path, stored: Stored, plan: _Plan, slots: Slots) -> int:
    """Read file by file; returns how many bytes were cut out of them."""
    from safetensors import safe_open

    by_file: dict[str, list[tuple[str, Overlap]]] = {}
    for name, reads in plan.reads.items():
        for each in reads:
            by_file.setdefault(stored.tensors[each.source].file, []).append((name, each))
    ready: dict[str, Tensor] = {}
    count = 0
    for file, of_file in by_file.items():
        with safe_open(folder / file, framework="pt") as opened:
            for name, each in of_file:
                if name not in ready:
                    held = plan.held[name]
                    dtype = kept_dtype(model, name, held.tensor.dtype)
                    ready[name] = held.local(slots.with_memory(held.tensor, dtype)).detach()
                block = opened.get_slice(each.source)[each.there]
                ready[name][each.here].copy_(each.as_local(block))
                count += block.numel() * block.element_size()
    for held in plan.held.values():  # those of which this rank has nothing
        slots.with_memory(held.tensor)
    compute_buffers(model, slots)
    return count


def _device(groups: FoldedGroups) -> torch.device:
    """Where this rank's part of the model belongs: where it communicates."""
    if groups.layout.world > 1:
        kind = groups.mesh("dense").device_type
    else:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
