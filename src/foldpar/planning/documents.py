"""Files that a plan reads: JSON objects, or an error of the caller's that says what is there instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foldpar.errors import FoldingError

__all__ = ["read_object"]


def read_object(path: Path, error: type[FoldingError]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        error: it cannot be read, is no JSON, or no object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as failed:
        raise error(f"{path} is not a JSON file: {failed}") from failed
    if not isinstance(document, dict):
        raise error(f"{path} holds no JSON object.")
    return document
