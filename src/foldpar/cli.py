"""The command line: ``foldpar show --world 8 --tp 2 --ep 4``, ``foldpar plan MODEL --gpus 64``, ``calibrate``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from foldpar import __version__
from foldpar.arguments import expect_writable
from foldpar.errors import FoldingError
from foldpar.layout import ORDERS, solve_layout
from foldpar.layout import picture as show

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a mistake ends in one line on stderr and exit code 2.

    Args:
        arguments: the words after the program's name; by default those of this process.
    """
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        for file in (getattr(chosen, name, None) for name in ("svg", "html")):
            if file is not None:
                expect_writable(file)
        print(chosen.run(chosen), flush=True)
    except BrokenPipeError:  # the reader, ``head`` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FoldingError, OSError) as error:
        parser.error(str(error))
    return 0


def _show(chosen: argparse.Namespace) -> str:
    layout = solve_layout(
        chosen.world, tp=chosen.tp, ep=chosen.ep, etp=chosen.etp, pp=chosen.pp, cp=chosen.cp, order=chosen.order
    )
    for file, draw in ((chosen.svg, "svg"), (chosen.html, "html")):
        if file is not None:
            from foldpar.layout import drawing

            drawn = getattr(drawing, draw)(layout, rank=chosen.rank, gpus_per_node=chosen.gpus_per_node)
            Path(file).write_text(drawn, encoding="utf-8")
    if chosen.json:
        return json.dumps(show.data(layout, rank=chosen.rank, gpus_per_node=chosen.gpus_per_node))
    return show.text(layout, rank=chosen.rank, gpus_per_node=chosen.gpus_per_node)


def _plan(chosen: argparse.Namespace) -> str:
    from foldpar.planning import ModelShape, plan, read_model

    numbers = {name: getattr(chosen, name) for name in _NUMBERS if getattr(chosen, name) is not None}
    if chosen.dense_layers is not None:
        if not 0 <= chosen.dense_layers <= (chosen.layers or 0):
            raise _usage(f"--dense-layers {chosen.dense_layers} can be 0 to --layers")
        numbers["dense_layers"] = tuple(range(chosen.dense_layers))
    if chosen.gpu is not None and chosen.machine is not None:
        raise _usage(f"--gpu {chosen.gpu} and --machine {chosen.machine} are two machines; say one")
    if chosen.model is not None and numbers:
        raise _usage(
            f"--{next(iter(numbers)).replace('_', '-')} is a number of a model without a file; MODEL has its own"
        )
    if chosen.model is None and (missing := [name for name in _NEEDED if name not in numbers]):
        raise _usage(
            f"say MODEL, a folder or file with a config.json, or its numbers; "
            f"{', '.join(f'--{name}' for name in missing)} missing"
        )
    found = plan(
        read_model(chosen.model) if chosen.model is not None else ModelShape(**numbers),
        gpu=next((each for each in (chosen.machine, chosen.gpu) if each is not None), "h100"),
        **{name: getattr(chosen, name) for name in _PLAN if getattr(chosen, name) is not None},
    )
    if chosen.html is not None:
        from foldpar.planning.page import page

        Path(chosen.html).write_text(page(found), encoding="utf-8")
    return found.to_json() if chosen.json else str(found)


def _calibrate(chosen: argparse.Namespace) -> str:
    from foldpar.planning.calibrate import calibrate

    return calibrate(chosen.file, name=chosen.name, quick=chosen.quick)


class _UsageError(FoldingError, ValueError):
    """Words that do not go together."""


def _usage(text: str) -> _UsageError:
    return _UsageError(f"{text}. See foldpar plan --help.")


_NUMBERS = (
    "hidden", "layers", "heads", "kv_heads", "head_dim", "vocab", "intermediate", "experts", "top_k", "expert_hidden",
    "shared_hidden",
)  # fmt: skip
_NEEDED = ("hidden", "layers", "heads", "vocab")
_SIZES = ("gpus", "gpus_per_node", "tokens", "batch", "chunks", "tp", "cp", "pp", "ep", "etp", "micro", "best")
_PLAN = (*_SIZES, "stage", "precision", "lanes", "load", "order", "recompute", "transport")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"foldpar: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="foldpar", description="Parallel folding: which rank does what.")
    parser.add_argument("--version", action="version", version=f"foldpar {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = commands.add_parser("show", help="draw a layout", description="Draw a layout: ranks, groups, nodes.")
    command.add_argument("--world", type=int, required=True, metavar="N", help="ranks in all")
    command.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallelism of the dense layers")
    command.add_argument("--ep", type=int, default=1, metavar="N", help="expert parallelism")
    command.add_argument("--etp", type=int, default=1, metavar="N", help="tensor parallelism inside an expert")
    command.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages")
    command.add_argument("--cp", type=int, default=1, metavar="N", help="context parallelism")
    command.add_argument("--order", default=ORDERS[0], help=f"{' or '.join(ORDERS)} (default: {ORDERS[0]})")
    command.add_argument("--rank", type=int, metavar="R", help="show whom this rank talks to on each axis")
    command.add_argument("--gpus-per-node", type=int, metavar="N", help="mark the groups that leave a node")
    command.add_argument("--json", action="store_true", help="print data instead of a picture")
    command.add_argument("--svg", metavar="FILE", help="also write a drawing of both views")
    command.add_argument("--html", metavar="FILE", help="also write a page: click a rank to see its groups")
    command.set_defaults(run=_show)
    _add_plan(commands.add_parser("plan", help="which fold for a model on so many GPUs", description=_PLAN_HELP))
    command = commands.add_parser("calibrate", help="measure this machine", description=_CALIBRATE_HELP)
    command.add_argument("file", metavar="FILE", help="the JSON file to write, for plan --machine")
    command.add_argument("--name", help="what to call the machine (default: the file's name)")
    command.add_argument("--quick", action="store_true", help="small sizes only: seconds, and rough")
    command.set_defaults(run=_calibrate)
    return parser


_PLAN_HELP = "Which layout, order, stage and recomputation to train a model with: bytes and milliseconds, predicted."
_CALIBRATE_HELP = "Measure rates and links of this machine into a file; under torchrun, links between the ranks too."


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", nargs="?", metavar="MODEL", help="a folder or file with a transformers config.json")
    command.add_argument("--gpus", type=int, required=True, metavar="N", help="how many GPUs there are")
    command.add_argument("--gpu", metavar="NAME", help="a machine that is known: h100 or h200 (default: h100)")
    command.add_argument("--machine", metavar="FILE", help="what foldpar calibrate wrote")
    command.add_argument("--gpus-per-node", type=int, metavar="N", help="where it is not the machine's own")
    command.add_argument("--tokens", type=int, metavar="N", help="tokens of a sequence (default: 4096)")
    command.add_argument("--batch", type=int, metavar="N", help="sequences of a step, all GPUs together (default: 512)")
    command.add_argument("--precision", metavar="P", help="mixed, bfloat16 or float32 (default: mixed)")
    command.add_argument("--lanes", metavar="L", help="replicated, or sharded: sequence parallelism")
    command.add_argument("--load", type=float, metavar="X", help="rows of the slowest rank, times the balanced number")
    command.add_argument("--chunks", type=int, metavar="N", help="chunks of layers a pipeline stage, interleaved")
    for name in ("tp", "cp", "pp", "ep", "etp", "stage", "micro"):
        command.add_argument(f"--{name}", type=int, metavar="N", help=f"only this {name}")
    command.add_argument("--order", help=f"only this order: {' or '.join(ORDERS)}")
    command.add_argument("--recompute", help="only this: none, experts or full")
    command.add_argument("--transport", help="only this way of rows: messages or one-sided")
    command.add_argument("--best", type=int, metavar="N", help="how many layouts to keep (default: 20)")
    command.add_argument("--json", action="store_true", help="print data, all of it")
    command.add_argument("--html", metavar="FILE", help="write a page: the table, bytes of a rank, memory against time")
    numbers = command.add_argument_group("a model without a file")
    for name in _NUMBERS:
        numbers.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    numbers.add_argument("--dense-layers", type=int, metavar="N", help="so many layers in front have no experts")
    command.set_defaults(run=_plan)
