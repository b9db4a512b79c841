"""What a parity check found: one line per tensor, one number per family, and what a mistake looks like."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foldpar.layout import Axis, FoldedLayout
from foldpar.testing.mistakes import Kind, explain_ratio
from foldpar.wording import below

__all__ = ["Comparison", "ParityFailed", "ParityReport", "compare", "norm_of_wanted"]

_ALIKE = 1e-3  # mistakes are factors and sums: far from 1, and far from the rounding of any dtype
_AXES: tuple[Axis, ...] = ("tp", "etp", "edp", "dp_cp")


class ParityFailed(AssertionError):  # noqa: N818
    """A folded module and one process differ by more than was allowed; the text is the whole report."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One tensor of a folded module beside that of one process, over all ranks that hold a share of it.

    Attributes:
        kind: what is compared: ``"parameter"`` (its value after folding), ``"output"``, ``"input gradient"``,
            ``"raw gradient"`` (before reduction), ``"gradient"`` (after it), or ``"gradient norm"``.
        name: of the parameter; ``"all"`` where there is none.
        family: the name of the parameter's family; ``"-"`` where there is none.
        difference: relative L2 difference, over all ranks together. Where the right value is zero but for rounding
            (under 1000 eps of the largest of its kind), relative to the largest of its kind.
        ratio: the least-squares factor between what is there and what should be; NaN where that is zero.
        looks_like: the mistake that the numbers look like; empty where there is none, or none that is known.
    """

    kind: Kind
    name: str
    family: str
    difference: float
    ratio: float
    looks_like: str

    def __str__(self) -> str:
        of = "" if self.name == "all" else f" of {self.name}"
        family = "" if self.family == "-" else f" ({self.family})"
        said = f": {self.looks_like}" if self.looks_like else ""
        return f"{self.kind}{of}{family} differs by {self.difference:.3g}{said}"


@dataclass(frozen=True, slots=True)
class ParityReport:
    """What :func:`~foldpar.testing.check_against_one_process` found. Print it, or ``raise_if(1e-11)``.

    Attributes:
        layout: the layout that was checked.
        comparisons: one per tensor and kind, in the order in which a step makes them.
    """

    layout: FoldedLayout
    comparisons: tuple[Comparison, ...]

    @property
    def worst(self) -> Comparison:
        """The tensor with the largest difference; NaN is larger than anything."""
        return max(self.comparisons, key=_size)

    @property
    def families(self) -> dict[str, float]:
        """The largest difference of any gradient of each family, raw or reduced."""
        of_gradients = [each for each in self.comparisons if each.kind in ("raw gradient", "gradient")]
        families = dict.fromkeys(each.family for each in of_gradients)
        return {
            family: max((each for each in of_gradients if each.family == family), key=_size).difference
            for family in families
        }

    def ok(self, tolerance: float = 1e-11) -> bool:
        """Whether nothing differs by more than ``tolerance``."""
        return not any(self.wrong(tolerance))

    def wrong(self, tolerance: float = 1e-11) -> list[Comparison]:
        """Those that differ by more than ``tolerance``, in the order of a step: read the first one first."""
        return [each for each in self.comparisons if not each.difference <= tolerance]

    def raise_if(self, tolerance: float = 1e-11) -> None:
        """Raise if anything differs by more than ``tolerance``.

        Raises:
            ParityFailed: its text is this report.
        """
        __tracebackhide__ = True
        if not self.ok(tolerance):
            raise ParityFailed(self._text(tolerance))

    def select(self, *kinds: Kind) -> ParityReport:
        """The same report with comparisons of these kinds only, such as ``select("gradient")``.

        Raises:
            ValueError: nothing of these kinds was compared.
        """
        chosen = tuple(each for each in self.comparisons if each.kind in kinds)
        if not chosen:
            there = ", ".join(map(repr, dict.fromkeys(each.kind for each in self.comparisons)))
            raise ValueError(f"Nothing of the kind {', '.join(map(repr, kinds))} was compared; there is {there}.")
        return ParityReport(self.layout, chosen)

    def __str__(self) -> str:
        return self._text(1e-11)

    def _text(self, tolerance: float) -> str:
        wrong = self.wrong(tolerance)
        worst = self.worst
        head = f"{self.layout!r} and one process: {len(self.comparisons)} comparisons"
        if not wrong:
            of = "" if worst.name == "all" else f" of {worst.name}"
            head += f", the largest difference is {worst.difference:.2g} ({worst.kind}{of})"
        else:
            head += f", {len(wrong)} differ by more than {tolerance:g}"
        lines = [head, "", *_table(self.comparisons)]
        if wrong:
            lines += [below([str(each) for each in wrong], 8, indent=0)]
        return "\n".join(lines)


def compare(
    kind: Kind,
    name: str,
    family: str,
    pairs: Sequence[tuple[Tensor, Tensor]],
    layout: FoldedLayout,
    *,
    largest: float = 0.0,
) -> Comparison:
    """Compare what each rank holds with what it should hold: ``(got, want)`` in rank order, equal in shape.

    ``largest`` is the largest norm of a tensor of this kind (:func:`norm_of_wanted`), which rounding is measured by.
    """
    difference, ratio, residual = _fit(pairs, largest)
    if difference > _ALIKE and residual <= _ALIKE * max(1.0, abs(ratio)):
        text = explain_ratio(ratio, layout, kind, tolerance=_ALIKE)
        text = text or f"{ratio:.4g} times what it should be, on every rank"
    elif difference > _ALIKE:
        text = "; ".join(_shape_of_mistake(pairs, layout))
    elif 1e-9 < difference < 1e-5 and pairs[0][1].dtype == torch.float64:
        text = "as large as float32 rounds: is something computed or sent in a narrower dtype?"
    else:
        text = "not a number" if math.isnan(difference) else ""
    return Comparison(kind, name, family, difference, ratio, text)


def norm_of_wanted(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The norm of what all ranks together should hold."""
    return math.sqrt(sum(float(want.double().square().sum()) for _, want in pairs))


def _fit(pairs: Sequence[tuple[Tensor, Tensor]], largest: float = 0.0) -> tuple[float, float, float]:
    """Relative difference, least-squares ratio, and the relative difference that is left after dividing by it."""
    wide = [(got.double(), want.double()) for got, want in pairs]
    norm = norm_of_wanted(pairs)
    off = math.sqrt(sum(float((got - want).square().sum()) for got, want in wide))
    if norm <= 1000 * torch.finfo(pairs[0][1].dtype).eps * largest or norm == 0:
        return off / (largest or 1.0), math.nan, math.inf
    ratio = sum(float((got * want).sum()) for got, want in wide) / norm**2
    left = math.sqrt(sum(float((got - ratio * want).square().sum()) for got, want in wide))
    return off / norm, ratio, left / norm


def _shape_of_mistake(pairs: Sequence[tuple[Tensor, Tensor]], layout: FoldedLayout) -> Iterator[str]:
    """What can be said where no single factor relates the two."""
    for axis in _AXES:
        size, summed = layout.size(axis), _summed(pairs, layout, axis)
        if size == 1 or summed is None:
            continue
        _, ratio, residual = _fit(summed)
        if residual < _ALIKE * size:
            alike = {1.0: "the sum is right: a SUM is missing", float(size): "their mean is right"}
            said = next((text for value, text in alike.items() if abs(ratio / value - 1) < _ALIKE), None)
            yield f"ranks of {axis} hold parts, and {said or f'their sum is {ratio:.4g} times what it should be'}"
            return
    wrong = [rank for rank, (got, want) in enumerate(pairs) if not _alike(got, want)]
    holds = {rank: _owner(pairs[rank][0], rank, pairs) for rank in wrong}
    if wrong and all(owner is not None for owner in holds.values()):
        shown = ", ".join(f"rank {rank} that of rank {owner}" for rank, owner in list(holds.items())[:4])
        yield f"ranks hold each other's shares ({shown}): a coordinate taken for another number"
    elif wrong and len(wrong) < len(pairs):
        yield f"wrong on rank {', '.join(map(str, wrong))} and right on the others"


def _summed(
    pairs: Sequence[tuple[Tensor, Tensor]], layout: FoldedLayout, axis: Axis
) -> list[tuple[Tensor, Tensor]] | None:
    summed = []
    for rank, (_, want) in enumerate(pairs):
        members = [pairs[member][0] for member in layout.group(axis, rank)]
        if any(member.shape != want.shape for member in members):
            return None
        summed.append((torch.stack(members).sum(0), want))
    return summed


def _owner(got: Tensor, rank: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> int | None:
    for other, (_, want) in enumerate(pairs):
        if other != rank and want.shape == got.shape and bool(want.any()) and _alike(got, want):
            return other
    return None


def _alike(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).double().norm() <= _ALIKE * want.double().norm())


def _size(comparison: Comparison) -> tuple[bool, float]:
    return math.isnan(comparison.difference), comparison.difference


def _table(comparisons: Sequence[Comparison]) -> list[str]:
    """Kind, family, how many, and the largest difference, a line per kind and family."""
    rows: dict[tuple[str, str], list[Comparison]] = {}
    for each in comparisons:
        rows.setdefault((each.kind, each.family), []).append(each)
    cells = [("compared", "family", "tensors", "difference")]
    for (kind, family), members in rows.items():
        cells.append((kind, family, str(len(members)), f"{max(members, key=_size).difference:.2g}"))
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
