"""How a model stores the weights of its experts: which dimension is which, and where gate and up lie."""

from __future__ import annotations

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from foldpar.arguments import expect

__all__ = ["ExpertStorage"]


@dataclass(frozen=True, slots=True)
class ExpertStorage:
    """The layout of ``gate_up_proj`` and ``down_proj``, the name of the first, and the names of their biases.

    With ``E`` experts, width ``H``, hidden width ``I`` and ``parts`` columns for each hidden unit (2 if gated, else 1):

    ==============  ===========================  =====================
    ``transposed``  ``gate_up_proj``             ``down_proj``
    ==============  ===========================  =====================
    ``False``       ``[E, parts * I, H]``        ``[E, H, I]``
    ``True``        ``[E, H, parts * I]``        ``[E, I, H]``
    ==============  ===========================  =====================

    ``interleaved``: gate and up of one hidden unit are neighbours (``g0 u0 g1 u1 ...``); otherwise all gates come first
    (``g0 g1 ... u0 u1 ...``). Biases are ``[E, parts * I]`` and ``[E, H]``.

    Example:
        >>> import torch
        >>> stored = torch.tensor([[1, 10, 2, 20, 3, 30, 4, 40]])  # the gate_up bias of one expert, 4 hidden units
        >>> storage = ExpertStorage(interleaved=True)
        >>> storage.own_gate_up(stored, parts=2, units=slice(2, 4)).tolist()
        [[3, 30, 4, 40]]
    """

    transposed: bool = False
    interleaved: bool = False
    gate_up_bias: str = "gate_up_bias"
    down_bias: str = "down_bias"
    gate_up: str = "gate_up_proj"

    def __post_init__(self) -> None:
        """Raise an ``ArgumentError`` for what is no bool and no name."""
        expect("ExpertStorage", transposed=(self.transposed, bool), interleaved=(self.interleaved, bool))
        names = {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias, "gate_up": self.gate_up}
        expect("ExpertStorage", **{what: (name, str) for what, name in names.items()})

    @property
    def names(self) -> tuple[str, str, str, str]:
        """Of the two weights and the two biases."""
        return self.gate_up, "down_proj", self.gate_up_bias, self.down_bias

    def pair_dimension(self, *, dims: int) -> int:
        """Which dimension of a ``gate_up`` weight (3 dims) or bias (2) one for the pair of gate and up would be.

        One process's ``[E, 2 * I, H]`` is ``[E, 2, I, H]`` then, so that a slice of hidden units is one block.
        """
        return 2 if dims == 3 and self.transposed else 1

    def gate_up_shape(self, experts: int, dim: int, columns: int) -> tuple[int, int, int]:
        """The shape of ``gate_up_proj`` with ``columns = parts * hidden``."""
        return (experts, dim, columns) if self.transposed else (experts, columns, dim)

    def down_shape(self, experts: int, dim: int, hidden: int) -> tuple[int, int, int]:
        """The shape of ``down_proj``."""
        return (experts, hidden, dim) if self.transposed else (experts, dim, hidden)

    def own_gate_up(self, stored: Tensor, *, parts: int, units: slice) -> Tensor:
        """The given hidden units of a ``gate_up`` weight ``[E, ., .]`` or bias ``[E, .]``, gate and up alike."""
        dim = " dim" if stored.dim() == 3 else ""
        columns = "(units parts)" if self.interleaved else "(parts units)"
        whole = f"experts{dim} {columns}" if self.transposed else f"experts {columns}{dim}"
        by_unit = f"units experts parts{dim}"
        return rearrange(rearrange(stored, f"{whole} -> {by_unit}", parts=parts)[units], f"{by_unit} -> {whole}")

    def own_down(self, stored: Tensor, *, units: slice) -> Tensor:
        """The given hidden units of ``down_proj``."""
        return stored[:, units] if self.transposed else stored[:, :, units]

    def from_concatenated(self, gate_up: Tensor, *, parts: int) -> Tensor:
        """Bring ``[E, parts * I, H]`` or ``[E, parts * I]``, gate above up, into this storage."""
        if self.interleaved:
            gate_up = rearrange(gate_up, "experts (parts units) ... -> experts (units parts) ...", parts=parts)
        if gate_up.dim() == 3 and self.transposed:
            gate_up = rearrange(gate_up, "experts columns dim -> experts dim columns")
        return gate_up

    def for_product(self, weight: Tensor) -> Tensor:
        """A view ``[E, out, in]`` of a weight, as products take it."""
        return weight.transpose(1, 2) if self.transposed else weight
