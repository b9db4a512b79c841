"""Drawing the same on ranks that may be threads of one process, which share torch's generator."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is drawn inside is drawn as after this seed, whatever other threads draw in here; no collectives inside."""
    with _ONE_AT_A_TIME:
        torch.manual_seed(seed)
        yield
