"""Nemotron-H: experts without a gate, whose first product is called ``up_proj``; attention and Mamba stay whole."""

from __future__ import annotations

from foldpar.models.known.adapter import MoEAdapter
from foldpar.models.known.interface import plain_weights

ADAPTERS = (MoEAdapter("NemotronHMoE", weights=plain_weights),)
