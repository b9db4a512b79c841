"""Telling a forward from its repetition."""

import torch


def in_backward() -> bool:
    """Whether this code runs inside a backward: a forward there is the recomputation of an earlier one.

    True inside both variants of ``torch.utils.checkpoint``. What is counted in forward is counted where this is false.
    """
    return torch._C._current_graph_task_id() != -1
