"""Hugging Face's files in and out of folded models, and foldpar's kernels in transformers: needs ``foldpar[hf]``."""

from __future__ import annotations

from foldpar.hf_experts import register_with_transformers
from foldpar.hf_export import ExportReport, export
from foldpar.hf_import import ImportReport, import_

__all__ = ["ExportReport", "ImportReport", "export", "import_", "register_with_transformers"]
