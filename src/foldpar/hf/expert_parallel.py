"""foldpar's journey of rows as an expert-parallel implementation of transformers, over the meshes that it makes.

    transformers: plan, meshes, DTensors, FSDP2 | here: rows to their experts, products, sums back

The ranks of its ``tp`` mesh hold the same tokens, which are replicated lanes, and its expert mesh is the expert view in
consecutive order with ``etp = 1``. So nothing is left to decide here.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers.distributed.expert_parallel import EPImplementation

from foldpar.comm import FoldedGroups
from foldpar.hf.kernels import grouped_products, why_not_grouped
from foldpar.models import experts_implementation
from foldpar.moe import BIASED, Abilities, Journey, LaneState, Routing, Sharing

__all__ = ["implementation"]


def implementation(name: str, one_sided: Sharing) -> type[EPImplementation]:
    """The class that transformers makes an object of for each module of experts.

    Experts are computed by foldpar's products where the experts implementation is transformers' default or ``name``.
    """
    groups_of: WeakValueDictionary[tuple[str, str], FoldedGroups] = WeakValueDictionary()

    class FoldparEP(EPImplementation):
        """Rows once per destination rank, and back as sums."""

        def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            groups = _groups(groups_of, ep_mesh, tp_mesh)
            self.state = LaneState(groups)
            self.experts, self.num_experts = experts, experts.num_experts * ep_mesh.size()
            self._journeys: dict[type, Journey] = {}

        @torch.compiler.disable(  # type: ignore[untyped-decorator]
            reason="The shapes follow the routing, so tracing it would compile anew for other routings."
        )
        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            """``[tokens, dim]`` to the same: the weighted sum of each token's experts, on every lane."""
            computed_by = self._experts(hidden_states.shape[1])
            journey = self._journeys.get(type(computed_by))
            if journey is None:
                journey = Journey(self.state, computed_by, one_sided=one_sided)
                self._journeys[type(computed_by)] = journey
            weights = top_k_weights.to(torch.promote_types(top_k_weights.dtype, hidden_states.dtype))
            routing = Routing(self.state.own(top_k_index), journey.ends.own(weights))
            return journey(computed_by, journey.ends.own(hidden_states), routing, tokens=hidden_states.shape[0])

        def _experts(self, dim: int) -> Any:
            chosen = experts_implementation(getattr(self.experts, "config", None))
            if chosen in ("grouped_mm", name) and why_not_grouped(self.experts) is None:
                return _Products(self.experts, self.num_experts, dim)
            return _OwnForward(self.experts_forward, self.num_experts, dim)

    return FoldparEP


def _groups(known: WeakValueDictionary[tuple[str, str], FoldedGroups], ep_mesh: Any, tp_mesh: Any) -> FoldedGroups:
    """One object for all layers over the same process groups, so that they take turns with one memory."""
    ep, tp = ep_mesh.get_group(), tp_mesh.get_group()
    key = (ep.group_name, tp.group_name)
    found = known.get(key)
    if found is None or found.ep.process_group not in (ep, None) or found.tp.process_group not in (tp, None):
        found = known[key] = FoldedGroups.over(tp=tp, ep=ep)
    return found


class _Products:
    """Experts computed by foldpar's grouped products."""

    def __init__(self, experts: Any, num_experts: int, dim: int) -> None:
        self.experts, self.num_experts, self.dim = experts, num_experts, dim
        self.abilities = Abilities(needs_sizes=BIASED if experts.has_bias else None)

    def __call__(
        self, rows: Tensor, rows_per_expert: Tensor, weights: Tensor, sizes: tuple[int, ...] | None = None
    ) -> Tensor:
        ends = rows_per_expert.cumsum(0, dtype=torch.int32)
        return grouped_products(self.experts, rows, ends, weights, sizes)


class _OwnForward:
    """Experts computed by transformers: each row with one expert and weight 1."""

    def __init__(self, forward: Any, num_experts: int, dim: int) -> None:
        self.forward, self.num_experts, self.dim = forward, num_experts, dim

    def __call__(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        local = torch.arange(len(rows_per_expert), device=rows.device)
        ids = local.repeat_interleave(rows_per_expert, output_size=rows.shape[0])
        given = rows if len(rows) else rows.sum(0, keepdim=True)  # gradients must be zeros, and not None
        ids = ids if len(rows) else ids.new_zeros(1)
        computed = self.forward(given, ids[:, None], torch.ones_like(given[:, :1]))
        return cast(Tensor, computed)[: len(rows)]
