"""Blocks that cannot be folded by replacing their experts, with the reason."""

from __future__ import annotations

from foldpar.models.known.adapter import MoEAdapter

ADAPTERS = (
    MoEAdapter(
        ("JetMoeMoE", "JetMoeMoA"),
        refused="JetMoe has experts in its attention too: queries and outputs are projected per expert around one "
        "attention of all tokens, which is no feed-forward layer; and its feed-forward experts are two modules, "
        "input_linear and output_linear, without the common convention.",
    ),
)
