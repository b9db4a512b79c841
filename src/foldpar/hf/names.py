"""Which part of which tensor in Hugging Face's files makes up a model's tensor: names, shapes and boxes of integers.

Files of many families hold a tensor per expert where the model holds all of them in one. What maps one to the other is
transformers' own conversion list of the family, read as data: each of its operations moves boxes here, no tensors.

    experts.0.gate_proj [I, H]  experts.0.up_proj [I, H]  experts.1.gate_proj ...
                           --MergeModulelist, Concatenate-->   experts.gate_up_proj [E, 2I, H]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from foldpar.errors import ModelError
from foldpar.parameters import Box, Share, replaced_at
from foldpar.wording import some

__all__ = [
    "Laid",
    "Names",
    "Overlap",
    "Piece",
    "as_they_are",
    "hub_shapes",
    "is_transformers_model",
    "lay_out",
    "natural",
    "overlaps",
    "plain_class",
]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a model's tensor that lies in one tensor of the files.

    ``box`` has its offsets in the model's tensor and its starts in the file's, both with a number per dimension of the
    model's tensor. ``axes`` are the dimensions of the file's tensor, in its order, as dimensions of the model's.
    """

    source: str
    box: Box
    axes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Laid:
    """A tensor as the files give it: its shape and the pieces that fill it.

    Example:
        >>> gate, up = Laid.stored("gate", (4, 8)), Laid.stored("up", (4, 8))
        >>> both = Laid.stack([gate]).joined([Laid.stack([up])], dim=1)
        >>> both.shape, [(piece.source, piece.box.offsets, piece.axes) for piece in both.pieces]
        ((1, 8, 8), [('gate', (0, 0, 0), (1, 2)), ('up', (0, 4, 0), (1, 2))])
    """

    shape: Shape
    pieces: tuple[Piece, ...]

    @classmethod
    def stored(cls, name: str, shape: Shape) -> Laid:
        """A tensor of the files as it is."""
        nothing = (0,) * len(shape)
        return cls(shape, (Piece(name, Box(nothing, shape, nothing), tuple(range(len(shape)))),))

    @classmethod
    def stack(cls, parts: Sequence[Laid]) -> Laid:
        """``torch.stack`` along a new first dimension."""
        _check_alike([part.shape for part in parts])
        moved = (
            Piece(
                piece.source,
                Box((place, *piece.box.offsets), (1, *piece.box.sizes), (0, *piece.box.starts)),
                tuple(axis + 1 for axis in piece.axes),
            )
            for place, part in enumerate(parts)
            for piece in part.pieces
        )
        return cls((len(parts), *parts[0].shape), tuple(moved))

    def joined(self, others: Sequence[Laid], dim: int) -> Laid:
        """``torch.cat`` with others behind it."""
        _check_alike([(*part.shape[:dim], *part.shape[dim + 1 :]) for part in (self, *others)])
        moved, length = [], 0
        for part in (self, *others):
            moved += [piece if not length else _shifted(piece, dim, length) for piece in part.pieces]
            length += part.shape[dim]
        return Laid(replaced_at(self.shape, dim, length), tuple(moved))

    def transposed(self, first: int, second: int) -> Laid:
        """``torch.transpose``."""
        order = list(range(len(self.shape)))
        order[first], order[second] = order[second], order[first]

        def swapped(values: Shape) -> Shape:
            return tuple(values[dim] for dim in order)

        moved = (
            Piece(
                piece.source,
                Box(swapped(piece.box.offsets), swapped(piece.box.sizes), swapped(piece.box.starts)),
                tuple(order.index(axis) for axis in piece.axes),
            )
            for piece in self.pieces
        )
        return Laid(swapped(self.shape), tuple(moved))

    def narrowed(self, dim: int, start: int, length: int) -> Laid:
        """``torch.narrow``."""
        cut = []
        for piece in self.pieces:
            # A box narrows by its starts, so the two ends change places for it.
            turned = Box(piece.box.starts, piece.box.sizes, piece.box.offsets).narrowed(dim, start, length, to=0)
            if turned is not None:
                cut.append(Piece(piece.source, Box(turned.starts, turned.sizes, turned.offsets), piece.axes))
        return Laid(replaced_at(self.shape, dim, length), tuple(cut))


@dataclass(frozen=True, slots=True)
class Names:
    """How the files' tensors make up the model's.

    ``laid`` is by the model's names; ``unused`` are tensors of the files that are in no tensor of the model;
    ``problems`` are texts about tensors that do not fit together.
    """

    laid: Mapping[str, Laid]
    unused: tuple[str, ...]
    problems: tuple[str, ...]


def lay_out(model: nn.Module, stored: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> Names:
    """Map the tensors of files, by name and shape, to those of a model, by name and global shape.

    A model that is none of transformers' has files of its own names.

    Raises:
        ModelError: transformers converts this family's files by an operation that moves more than boxes.
    """
    rules = _Rules.of(model)
    collected: dict[str, dict[str, list[Laid]]] = {}
    converter_of: dict[str, Any] = {}
    unused: list[str] = []
    for name in sorted(stored, key=natural):
        target, converter, pattern = rules.renamed(name, wanted)
        if not any(each in wanted for each in _targets_of(target, converter)):
            unused.append(name)
            continue
        converter_of.setdefault(target, converter)
        if converter_of[target] is not converter:  # the model's tensor is stored twice, in two ways
            unused.append(name)
            continue
        collected.setdefault(target, {}).setdefault(pattern, []).append(Laid.stored(name, tuple(stored[name])))
    laid: dict[str, Laid] = {}
    problems: list[str] = []
    for target, parts in collected.items():
        try:
            laid |= _converted(target, parts, converter_of[target], wanted)
        except _MisfitError as error:
            names = [piece.source for part in parts.values() for each in part for piece in each.pieces]
            problems.append(f"{target}: {some(names, 1)} do not go together: {error}")
    return Names({name: each for name, each in laid.items() if name in wanted}, tuple(unused), tuple(problems))


def as_they_are(model: nn.Module, stored: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> Names:
    """Files that hold the model's tensors under its own names."""
    laid = {name: Laid.stored(name, tuple(shape)) for name, shape in stored.items() if name in wanted}
    return Names(laid, tuple(name for name in sorted(stored, key=natural) if name not in wanted), ())


def hub_shapes(model: nn.Module, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The names and shapes that a model's tensors have in files, as ``save_pretrained`` would write them."""
    if not is_transformers_model(model):
        return dict(shapes)
    from transformers.core_model_loading import revert_weight_conversion

    stand_ins = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    written = revert_weight_conversion(cast(Any, plain_twin(model)), stand_ins)
    return {name: tuple(tensor.shape) for name, tensor in written.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Where a rank's share meets the files.


@dataclass(frozen=True, slots=True)
class Overlap:
    """A block that a rank holds of a tensor of the files.

    ``there`` are slices of the file's tensor, ``here`` of the rank's local one. ``order`` are the dimensions of what is
    cut out ``there`` as the local tensor has them, ``None`` for one of size 1 that only the local tensor has.
    """

    source: str
    there: tuple[slice, ...]
    here: tuple[slice, ...]
    order: tuple[int | None, ...]

    def within(self, box: Box) -> Overlap | None:
        """What of it lies in a box of the file's tensor, with ``there`` counted from where the box begins."""
        there, here = [], list(self.here)
        for dim, (cut, offset, size) in enumerate(zip(self.there, box.offsets, box.sizes, strict=True)):
            first, end = max(cut.start, offset), min(cut.stop, offset + size)
            if first >= end:
                return None
            there.append(slice(first - offset, end - offset))
            local = self.order.index(dim)
            start = here[local].start + first - cut.start
            here[local] = slice(start, start + end - first)
        return Overlap(self.source, tuple(there), tuple(here), self.order)

    def as_local(self, block: torch.Tensor) -> torch.Tensor:
        """What was cut out there, as it goes here."""
        block = block.permute([place for place in self.order if place is not None])
        return block[tuple(None if place is None else slice(None) for place in self.order)]

    def as_stored(self, block: torch.Tensor) -> torch.Tensor:
        """What was cut out here, as it goes there."""
        block = block[tuple(0 if place is None else slice(None) for place in self.order)]
        kept = [place for place in self.order if place is not None]
        return block.permute([kept.index(place) for place in range(len(kept))])


def overlaps(share: Share, laid: Laid) -> Iterator[Overlap]:
    """The blocks of the files' tensors that a share of the model's tensor is made of."""
    for piece in laid.pieces:
        order = tuple(piece.axes.index(dim) if dim in piece.axes else None for dim in range(len(laid.shape)))
        for box in share.boxes:
            met = _meet(box, piece.box)
            if met is not None:
                here, there = met
                yield Overlap(piece.source, tuple(there[axis] for axis in piece.axes), here, order)


def _meet(box: Box, piece: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What two boxes of one tensor have in common, as slices of the tensors in which they start."""
    here, there = [], []
    for dim, (one, other) in enumerate(zip(box.offsets, piece.offsets, strict=True)):
        first, end = max(one, other), min(one + box.sizes[dim], other + piece.sizes[dim])
        if first >= end:
            return None
        here.append(slice(box.starts[dim] + first - one, box.starts[dim] + end - one))
        there.append(slice(piece.starts[dim] + first - other, piece.starts[dim] + end - other))
    return tuple(here), tuple(there)


# ---------------------------------------------------------------------------------------------------------------------
# transformers' conversion lists, as data.


def is_transformers_model(model: nn.Module) -> bool:
    """Whether it is a ``PreTrainedModel``; told by name, so that others need no transformers."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__)


def plain_class(model: nn.Module) -> type[nn.Module]:
    """The class of a model before FSDP2 gave it one of its own."""
    return next(cls for cls in type(model).__mro__ if not hasattr(cls, "set_requires_gradient_sync"))


def plain_twin(model: nn.Module) -> nn.Module:
    """The model, or where FSDP2 changed its class, by which conversions are found, another one without numbers."""
    kind = plain_class(model)
    if kind is type(model):
        return model
    with torch.device("meta"):
        twin = cast(Any, kind)(deepcopy(model.config))
    if getattr(model, "_weight_conversions", None) is not None:
        twin._weight_conversions = model._weight_conversions
    return cast(nn.Module, twin)


@dataclass(frozen=True, slots=True)
class _Rules:
    """A family's renamings and conversions, in the order in which they apply."""

    renamings: tuple[Any, ...]
    converters: tuple[Any, ...]
    prefix: str

    @classmethod
    def of(cls, model: nn.Module) -> _Rules:
        if not is_transformers_model(model):
            return cls((), (), "")
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        found = get_model_conversion_mapping(cast(Any, plain_twin(model)))
        return cls(
            tuple(rule for rule in found if isinstance(rule, WeightRenaming)),
            tuple(rule for rule in found if isinstance(rule, WeightConverter)),
            cast(str, model.base_model_prefix),
        )

    def renamed(self, name: str, wanted: Mapping[str, Shape]) -> tuple[str, Any, str]:
        """The name of the model's tensor, the conversion that makes it, if any, and what of it this one is."""
        target, converter, pattern = name, None, name
        for rule in self.renamings:
            target, _ = rule.rename_source_key(target)
        for rule in self.converters:
            target, matched = rule.rename_source_key(target)
            if matched is not None:
                converter, pattern = rule, matched
                break
        target = self._prefixed(target, wanted)
        known = any(each in wanted for each in _targets_of(target, converter))
        if not known and (as_it_is := self._prefixed(name, wanted)) in wanted:
            return as_it_is, None, name
        return target, converter, pattern

    def _prefixed(self, name: str, wanted: Mapping[str, Shape]) -> str:
        """Files of a model without a head lack the prefix of the model inside one, or the other way round."""
        if not self.prefix or name in wanted:
            return name
        without = name.removeprefix(f"{self.prefix}.")
        return next((each for each in (without, f"{self.prefix}.{name}") if each in wanted), name)


def _targets_of(target: str, converter: Any) -> list[str]:
    """All tensors that a conversion makes, by the name of the first."""
    if converter is None:
        return [target]
    first = converter.target_patterns[0]
    return [target.replace(first, each) for each in converter.target_patterns]


class _MisfitError(Exception):
    """Tensors that an operation cannot bring together."""


def _converted(
    target: str, parts: dict[str, list[Laid]], converter: Any, wanted: Mapping[str, Shape]
) -> dict[str, Laid]:
    if converter is None:
        (found,) = parts.values()
        return {target: found[0]}
    values: dict[str, Any] = dict(parts)
    for operation in converter.operations:
        apply = _OPERATIONS.get(type(operation).__name__)
        if apply is None:
            known = ", ".join(sorted(_OPERATIONS))
            raise ModelError(
                f"{target} is made from the files' {', '.join(parts)} by transformers' {operation!r}, which is not "
                f"known here; known are {known}. Load the model with from_pretrained, save it with "
                f"save_pretrained(folder, save_original_format=False), and read that folder."
            )
        values = apply(operation, values, converter, wanted.get(target))
    names = dict(zip(converter.target_patterns, _targets_of(target, converter), strict=True))
    return {names[pattern]: _only(value) for pattern, value in values.items()}


def _merge(operation: Any, values: dict[str, Any], converter: Any, _: object) -> dict[str, Any]:
    if operation.dim != 0:
        raise ModelError(f"{operation!r} stacks experts along another dimension than the first.")
    alone = len(values) == 1 and len(converter.source_patterns) == 1
    return {converter.target_patterns[0] if alone else pattern: Laid.stack(value) for pattern, value in values.items()}


def _concatenate(operation: Any, values: dict[str, Any], converter: Any, _: object) -> dict[str, Any]:
    missing = [pattern for pattern in converter.source_patterns if pattern not in values]
    if missing:
        raise _MisfitError(f"there is no {' and no '.join(missing)}")
    first, *others = (_only(values[pattern]) for pattern in converter.source_patterns)
    return {converter.target_patterns[0]: first.joined(others, operation.dim)}


def _chunk(operation: Any, values: dict[str, Any], converter: Any, _: object) -> dict[str, Any]:
    (value,) = values.values()
    whole, targets = _only(value), converter.target_patterns
    length, left = divmod(whole.shape[operation.dim], len(targets))
    if left:
        raise _MisfitError(f"{list(whole.shape)} is not {len(targets)} equal parts")
    return {each: whole.narrowed(operation.dim, place * length, length) for place, each in enumerate(targets)}


def _transpose(operation: Any, values: dict[str, Any], converter: Any, wanted: Shape | None) -> dict[str, Any]:
    ((pattern, value),) = values.items()
    laid = _only(value)
    if not (getattr(operation, "check_dims", False) and laid.shape == wanted):
        laid = laid.transposed(operation.dim0, operation.dim1)
    return {converter.target_patterns[0] if len(converter.target_patterns) == 1 else pattern: laid}


_Operation = Callable[[Any, dict[str, Any], Any, "Shape | None"], dict[str, Any]]
_OPERATIONS: Mapping[str, _Operation] = {
    "MergeModulelist": _merge,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Transpose": _transpose,
}


def _only(value: Any) -> Laid:
    """The one tensor there is, out of its list."""
    if isinstance(value, Laid):
        return value
    if len(value) != 1:
        raise _MisfitError(f"there are {len(value)} where one is expected")
    return cast(Laid, value[0])


def _check_alike(shapes: Sequence[Shape]) -> None:
    if len(set(shapes)) > 1:
        raise _MisfitError("their shapes are " + ", ".join(str(list(shape)) for shape in dict.fromkeys(shapes)))


def _shifted(piece: Piece, dim: int, by: int) -> Piece:
    box = piece.box
    return Piece(
        piece.source, Box(replaced_at(box.offsets, dim, box.offsets[dim] + by), box.sizes, box.starts), piece.axes
    )


def natural(name: str) -> list[tuple[int, int, str]]:
    """``experts.9`` before ``experts.10``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"[.]", name)]
