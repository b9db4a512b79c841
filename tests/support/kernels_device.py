"""Where the tests of Triton kernels run: on a GPU, or in Triton's interpreter where ``TRITON_INTERPRET=1`` asks for it.

Importing this skips a test module that can run in neither.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or Triton with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
