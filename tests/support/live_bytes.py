"""Count the bytes of tensors that live at the same time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """``peak`` is the largest sum of the storages that operations made inside, each from its birth to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in given and storage._cdata not in self._seen:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._live += size
        self.peak = max(self.peak, self._live)

        def gone() -> None:
            self._live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.finalize(storage, gone)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for each in tree_leaves(values):
        if isinstance(each, torch.Tensor):
            local = getattr(each, "_local_tensor", each)  # of a DTensor
            if not local.is_meta:
                yield local.untyped_storage()
