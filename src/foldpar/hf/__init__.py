"""Whole tensors in files: Hugging Face's in and out of folded models, and one's own; needs ``foldpar[hf]``.

    reader        ``import_``: the files of a hub model into any layout, each rank its share
    writer        export: a folded model as files that ``from_pretrained`` reads
    weights       the same for a model of one's own, under the names that it has in one process
    names         which tensor of a file is which part of a parameter
    materialise   memory for what is on the meta device
    files         the safetensors format; ``weight_files``: whole tensors put together a buffer at a time
    registration  foldpar inside transformers' own models and ``Trainer``
    kernels       its expert products there; ``expert_parallel``: its journey of rows

Laws: no rank holds more than its share and a buffer; every bit arrives as it is.
"""

from __future__ import annotations

from foldpar.hf.reader import ImportReport, import_
from foldpar.hf.registration import register_with_transformers
from foldpar.hf.weights import load_weights, save_weights, whole_state_dict
from foldpar.hf.writer import ExportReport, export

__all__ = [
    "ExportReport",
    "ImportReport",
    "export",
    "import_",
    "load_weights",
    "register_with_transformers",
    "save_weights",
    "whole_state_dict",
]
