"""Packages that a part of the library needs, asked for before anything is communicated."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["require_numpy", "require_safetensors", "why_no_objects"]


def why_no_objects() -> str | None:
    """Why torch cannot send Python objects between ranks; ``None`` where it can."""
    if find_spec("numpy") is not None:
        return None
    return (
        "numpy is not installed, with which torch.distributed sends Python objects between ranks. Install it, or "
        "foldpar with the extra that brings it: pip install 'foldpar[checkpoint]'."
    )


def require_numpy(doing: str) -> None:
    """Raise if ranks cannot send each other what they need for something.

    Raises:
        ImportError: names numpy, and the extra that brings it.
    """
    if reason := why_no_objects():
        raise ImportError(f"{doing}: {reason}", name="numpy")


def require_safetensors(doing: str) -> None:
    """Raise if safetensors files cannot be read.

    Raises:
        ImportError: names safetensors, and the extra that brings it.
    """
    if find_spec("safetensors") is None:
        raise ImportError(
            f"{doing}: safetensors is not installed, which reads such files. Install it, or foldpar with the extra "
            f"that brings it: pip install 'foldpar[hf]'.",
            name="safetensors",
        )
