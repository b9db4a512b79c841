"""Routed experts: grouped feed-forward layers over expert-major rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from foldpar.errors import ShapeError
from foldpar.groups import FoldedGroups

Activation = Literal["swiglu", "geglu", "silu", "gelu", "relu"]
_GATED = ("swiglu", "geglu")
_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
}


class GroupedExperts(nn.Module):
    """The experts that live on this rank, and of each the slice that lives here.

    Parameters are stored as most model files store them, for this rank's ``local_experts = num_experts / ep`` and
    ``local_hidden = hidden_dim / etp``:

    - ``gate_up_proj``: ``[local_experts, 2 * local_hidden, dim]``, gate above up; for a plain activation
      ``[local_experts, local_hidden, dim]``, the up projection alone;
    - ``down_proj``: ``[local_experts, dim, local_hidden]``.

    A gated expert is sliced so that gate and up of one hidden unit stay on one rank. With ``etp > 1`` the output is a
    partial sum over the slices; :func:`foldpar.combine` adds them up.

    Values are drawn per *global* expert from ``seed``, so one seed gives the same model in every layout. ``seed=None``
    takes one number from torch's default generator: equal on all ranks after equal ``torch.manual_seed``.

    Raises:
        ShapeError: ``ep`` does not divide ``num_experts``, or ``etp`` does not divide ``hidden_dim``.

    Source: SwiGLU: Shazeer 2020; grouped products: MegaBlocks (Gale et al. 2022), section 4.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        groups: FoldedGroups,
        *,
        activation: Activation = "swiglu",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in _ELEMENTWISE:
            raise ValueError(f"activation is {activation!r}; choose one of {', '.join(map(repr, _ELEMENTWISE))}.")
        _divides("ep", groups.ep.size, "num_experts", num_experts)
        _divides("etp", groups.etp.size, "hidden_dim", hidden_dim)
        self.num_experts, self.dim, self.hidden_dim = num_experts, dim, hidden_dim
        self.groups, self.activation = groups, activation
        self.local_experts = num_experts // groups.ep.size
        self.local_hidden = hidden_dim // groups.etp.size
        self.first_expert = groups.ep.index * self.local_experts
        self._parts = 2 if activation in _GATED else 1
        self._units = slice(groups.etp.index * self.local_hidden, (groups.etp.index + 1) * self.local_hidden)
        self._elementwise = _ELEMENTWISE[activation]
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate_up_proj = nn.Parameter(torch.empty(self.local_experts, self._parts * self.local_hidden, dim, **like))
        self.down_proj = nn.Parameter(torch.empty(self.local_experts, dim, self.local_hidden, **like))
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw every expert as ``nn.Linear`` would, from a generator keyed by ``seed`` and the global expert id."""
        seed = int(torch.randint(2**31, ()).item()) if seed is None else seed
        if self.gate_up_proj.is_meta:
            return
        for local in range(self.local_experts):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + self.first_expert + local) % 2**63)
            gate_up = torch.empty(self._parts * self.hidden_dim, self.dim)
            gate_up.uniform_(-(self.dim**-0.5), self.dim**-0.5, generator=generator)
            down = torch.empty(self.dim, self.hidden_dim)
            down.uniform_(-(self.hidden_dim**-0.5), self.hidden_dim**-0.5, generator=generator)
            self.gate_up_proj[local].copy_(self._gate_up_slice(gate_up))
            self.down_proj[local].copy_(self._down_slice(down))

    @classmethod
    def from_dense(
        cls, gate_up_proj: Tensor, down_proj: Tensor, groups: FoldedGroups, *, activation: Activation = "swiglu"
    ) -> GroupedExperts:
        """Take this rank's share of all experts' weights; nothing else is copied.

        ``gate_up_proj`` is ``[num_experts, 2 * hidden_dim, dim]`` (``[num_experts, hidden_dim, dim]`` for a plain
        activation) and ``down_proj`` is ``[num_experts, dim, hidden_dim]``. Device and dtype carry over.

        Raises:
            ShapeError: the two do not fit each other or the layout.
        """
        parts = 2 if activation in _GATED else 1
        if gate_up_proj.dim() != 3 or down_proj.dim() != 3:
            raise ShapeError("gate_up_proj and down_proj must have three dimensions, experts first.")
        num_experts, dim, hidden_dim = down_proj.shape
        if gate_up_proj.shape != (num_experts, parts * hidden_dim, dim):
            raise ShapeError(
                f"down_proj {list(down_proj.shape)} means num_experts = {num_experts}, dim = {dim}, hidden_dim = "
                f"{hidden_dim}; then gate_up_proj must be {[num_experts, parts * hidden_dim, dim]} for "
                f"{activation!r}, and is {list(gate_up_proj.shape)}."
            )
        experts = cls(num_experts, dim, hidden_dim, groups, activation=activation, seed=0, device="meta")
        mine = slice(experts.first_expert, experts.first_expert + experts.local_experts)
        experts.gate_up_proj = nn.Parameter(_own(experts._gate_up_slice(gate_up_proj[mine])))
        experts.down_proj = nn.Parameter(_own(experts._down_slice(down_proj[mine])))
        return experts

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        """Compute expert-major rows: ``[sum(rows_per_expert), dim]`` to the same shape.

        ``rows_per_expert`` is ``[local_experts]``, int32, on the rows' device; experts without rows are allowed and
        get zero gradients. Where a dtype or width allows it the product is torch's ``grouped_mm``, else a loop.

        Backward:
            Plain. With ``etp > 1`` the gradient of ``rows`` is this slice's summand.
        """
        hidden = _grouped_linear(rows, self.gate_up_proj, rows_per_expert)
        if self._parts == 2:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = self._elementwise(gate) * up
        else:
            hidden = self._elementwise(hidden)
        return _grouped_linear(hidden, self.down_proj, rows_per_expert)

    def extra_repr(self) -> str:
        last = self.first_expert + self.local_experts - 1
        return (
            f"experts {self.first_expert}..{last} of {self.num_experts}, dim={self.dim}, "
            f"hidden {self.local_hidden} of {self.hidden_dim}, activation={self.activation!r}"
        )

    def _gate_up_slice(self, weight: Tensor) -> Tensor:
        """This rank's hidden units, of the gate and of the up projection: ``[..., parts * hidden_dim, dim]``."""
        parts = rearrange(weight, "... (part hidden) dim -> ... part hidden dim", part=self._parts)
        return rearrange(parts[..., self._units, :], "... part hidden dim -> ... (part hidden) dim")

    def _down_slice(self, weight: Tensor) -> Tensor:
        return weight[..., self._units]


def _own(view: Tensor) -> Tensor:
    """A copy that shares nothing with the full weight, so that the full weight can be freed."""
    return view.detach().clone(memory_format=torch.contiguous_format)


def _divides(degree: str, value: int, name: str, total: int) -> None:
    if total % value:
        valid = [candidate for candidate in range(1, total + 1) if total % candidate == 0]
        raise ShapeError(
            f"{degree} = {value} does not divide {name} = {total}. With {name} = {total}, {degree} can be "
            f"{', '.join(map(str, valid))}."
        )


def _grouped_linear(rows: Tensor, weight: Tensor, rows_per_expert: Tensor) -> Tensor:
    """``[rows, in] x [experts, out, in] -> [rows, out]``, each row with the weight of its group."""
    in_features, out_features = weight.shape[-1], weight.shape[-2]
    aligned = all(width * rows.element_size() % 16 == 0 for width in (in_features, out_features))
    if rows.dtype in (torch.bfloat16, torch.float16, torch.float32) and aligned:
        ends = rows_per_expert.cumsum(0, dtype=torch.int32)
        return _contiguous_gradient(F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends))
    chunks = rows.split(rows_per_expert.tolist())
    return torch.cat([F.linear(chunk, matrix) for chunk, matrix in zip(chunks, weight.unbind(), strict=True)])


class _ContiguousGradient(Function):
    """``grouped_mm`` rejects an expanded gradient, such as that of a plain ``.sum()``, even of no rows at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous() if grad.numel() else grad.new_empty(grad.shape)


def _contiguous_gradient(x: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, _ContiguousGradient).apply(x))
