"""Nemotron-H: experts without a gate, whose first product is called ``up_proj``; attention and Mamba stay whole."""

from __future__ import annotations

from foldpar.models.known.adapter import MoEAdapter
from foldpar.moe import ExpertStorage

ADAPTERS = (MoEAdapter("NemotronHMoE", storage=ExpertStorage(gate_up="up_proj")),)
