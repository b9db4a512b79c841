"""The command line: ``python -m foldpar show --world 8 --tp 2 --ep 4``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from foldpar import __version__
from foldpar.errors import LayoutError
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
        print(_show(chosen))
        sys.stdout.flush()
    except LayoutError as error:
        parser.error(str(error))
    except BrokenPipeError:  # the reader, ``head`` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _show(chosen: argparse.Namespace) -> str:
    layout = solve_layout(
        chosen.world, tp=chosen.tp, ep=chosen.ep, etp=chosen.etp, pp=chosen.pp, cp=chosen.cp, order=chosen.order
    )
    if chosen.json:
        return json.dumps(show.data(layout, rank=chosen.rank, gpus_per_node=chosen.gpus_per_node))
    return show.text(layout, rank=chosen.rank, gpus_per_node=chosen.gpus_per_node)


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
    return parser
