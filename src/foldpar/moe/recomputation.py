"""Telling a forward from its repetition, and doing in it what no repetition does."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes


def in_backward() -> bool:
    """Whether this code runs inside a backward: a forward there is the recomputation of an earlier one.

    True inside both variants of ``torch.utils.checkpoint``. What is counted in forward is counted where this is false.
    """
    return torch._C._current_graph_task_id() != -1


@contextmanager
def unseen_by_modes() -> Iterator[None]:
    """Hide operations from dispatch modes, such as selective checkpointing.

    That one keeps outputs of a forward by their order and hands them out again in the recomputation, which would be
    the wrong ones where the forward did more.
    """
    with _disable_current_modes():
        yield
