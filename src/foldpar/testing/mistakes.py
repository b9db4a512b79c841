"""Which mistake a wrong number looks like: a ratio read as an expression of the layout's degrees."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Literal

from foldpar.layout import FoldedLayout

__all__ = ["Kind", "explain_ratio"]

Kind = Literal["parameter", "output", "input gradient", "raw gradient", "gradient", "gradient norm"]

# By the kind of tensor, then by the expression; the first that fits is told first.
_BEFORE_REDUCTION = {
    "tp": "summed over lanes that each hold the whole. A gradient converted twice (copy_to_group before a layer that "
    "has it built in, such as torch's ColwiseParallel), or lane_grads='partial' for one that is equal on all lanes",
    "1/tp": "a lane's part taken for the whole. A conversion is missing where the lanes part (copy_to_group, "
    "split_rows), or something divides by tp that nothing multiplied",
    "tp**2": "summed twice over lanes that each hold the whole: two conversions too many",
    "ep": "counted once per EP rank; nothing is to be multiplied by ep",
    "1/ep": "divided by ep: an average over ranks that hold different experts",
    "etp": "counted once per slice of an expert: what every ETP rank holds whole was summed",
    "1/etp": "one slice of an expert for all of them: the partial sums over ETP are not reduced",
    "dp*cp": "summed over the data ranks before reduction",
    "1/(dp*cp)": "divided by dp*cp before reduction: the loss of a data rank is not divided by the number of ranks",
    "edp": "summed over edp before reduction",
    "1/edp": "divided by edp before reduction",
}
_AFTER_REDUCTION = {
    "tp": "SUM over lanes that each hold the whole (AVERAGE or SKIP is right), or a factor tp that nothing cancelled "
    "(EXPERT_TP_CANCEL)",
    "1/tp": "AVERAGE over lanes that each hold a part (SUM is right), or EXPERT_TP_CANCEL without a factor to cancel",
    "etp": "summed over ETP ranks that each hold the whole",
    "1/etp": "averaged over ETP ranks that each hold a part, such as an output bias that is added once: SUM is right",
    "(dp*cp)/edp": "an expert's gradient averaged over edp; the rule is: summed over edp, divided by dp*cp",
    "edp/(dp*cp)": "an expert's gradient reduced twice, or multiplied by edp/(dp*cp) where no wrapper had averaged it",
    "1/edp": "an expert's gradient averaged over edp, and divided by dp*cp as well",
    "edp": "multiplied by edp: reduced twice over edp",
    "dp*cp": "not divided by dp*cp although the losses are means, or summed over the data ranks twice",
    "1/(dp*cp)": "divided by dp*cp twice: loss='mean' for losses that were divided already, or a wrapper averages too",
    "cp": "divided by dp alone: context ranks are data ranks too",
    "dp": "divided by cp alone",
    "1/cp": "divided by cp twice",
    "1/dp": "divided by dp twice",
    "ep": "multiplied by ep, or averaged over dp*cp/ep ranks: an expert's gradient is never divided by ep",
    "1/ep": "divided by ep: an expert's gradient is never divided by ep",
    "tp**2": "summed over the lanes twice",
}
_OUTPUT = {
    "tp": "added up over lanes that each hold the whole",
    "1/tp": "a lane's part taken for the whole, or averaged over lanes that hold parts",
    "etp": "added up over ETP ranks that each hold the whole",
    "1/etp": "one slice of an expert for all of them: the partial sums over ETP are not reduced",
}
_TEXTS: dict[Kind, dict[str, str]] = {
    "parameter": {},
    "output": _OUTPUT,
    "input gradient": _BEFORE_REDUCTION,
    "raw gradient": _BEFORE_REDUCTION,
    "gradient": _AFTER_REDUCTION,
    "gradient norm": {},
}
_COUNTED_MORE_THAN_ONCE = "squares counted once per rank of replicas, or something scaled by a norm"


def explain_ratio(ratio: float, layout: FoldedLayout, kind: Kind = "gradient", *, tolerance: float = 1e-6) -> str:
    """What a tensor that is ``ratio`` times the right one looks like in this layout; empty for 1 and where unknown.

    Degrees that are equal cannot be told apart by their value; a layout in which they differ tells more.

    Example:
        >>> layout = FoldedLayout(12, tp=2, ep=3)
        >>> explain_ratio(2, layout, "raw gradient")[:50]
        '2 = tp: summed over lanes that each hold the whole'
        >>> explain_ratio(1.5, layout, "gradient")[:57]
        "1.5 = (dp*cp)/edp: an expert's gradient averaged over edp"
        >>> explain_ratio(0.123, layout)
        ''
    """
    if abs(ratio - 1) < tolerance:
        return ""
    if abs(ratio) < tolerance:
        return "0: nothing arrived (a detached tensor, or rows that were not sent)"
    texts = _TEXTS[kind]
    found = [name for name, value in _expressions(layout) if abs(ratio / value - 1) < tolerance]
    known = [name for name in texts if name in found]
    if known:
        return f"{_number(ratio)} = {' = '.join(known)}: {'; or '.join(texts[name] for name in known)}"
    if found:
        said = f": {_COUNTED_MORE_THAN_ONCE}" if "sqrt" in found[0] else ""
        return f"{_number(ratio)} = {' = '.join(found)}{said}"
    if abs(ratio - 2) < tolerance and "gradient" in kind:
        return "2: counted twice (a second backward, or gradients of an earlier step that were not cleared)"
    if abs(ratio + 1) < tolerance:
        return "-1: the sign is wrong"
    return ""


def _expressions(layout: FoldedLayout) -> Iterator[tuple[str, float]]:
    """Names and values, those of the layout's degrees first; none that equals 1."""
    owners = layout.dp * layout.cp
    degrees = {"tp": layout.tp, "ep": layout.ep, "etp": layout.etp, "edp": layout.edp, "dp*cp": owners}
    if layout.dp > 1 and layout.cp > 1:
        degrees |= {"dp": layout.dp, "cp": layout.cp}
    for name, value in degrees.items():
        if value > 1:
            yield name, value
            yield f"1/({name})" if "*" in name else f"1/{name}", 1 / value
    if owners > 1 and layout.edp > 1 and owners != layout.edp:
        yield "(dp*cp)/edp", owners / layout.edp
        yield "edp/(dp*cp)", layout.edp / owners
    if layout.tp > 1:
        yield "tp**2", layout.tp**2
    for name, value in (degrees | {"tp*dp*cp": layout.tp * owners}).items():
        if value > 1:
            yield f"sqrt({name})", sqrt(value)
            yield f"1/sqrt({name})", 1 / sqrt(value)


def _number(ratio: float) -> str:
    return f"{ratio:.4g}"
