"""Routed experts: grouped feed-forward layers over expert-major rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from foldpar.arguments import expect, expect_sizes
from foldpar.comm import FoldedGroups, adopt, distributed_parameter, is_dtensor, local_parts, opened
from foldpar.errors import ShapeError
from foldpar.families import EXPERT_BIAS, ROUTED_EXPERT, ParameterFamily
from foldpar.moe.abilities import BIASED, Abilities
from foldpar.moe.kernels.activations import Activation, check_activation, is_gated
from foldpar.moe.kernels.grouped import grouped_feed_forward
from foldpar.moe.kernels.permutation import Places
from foldpar.moe.storage import ExpertStorage
from foldpar.parameters import mark_parameters, take_shares_on_load, watch_optimizers
from foldpar.wording import not_dividing


class ExpertShare(nn.Module):
    """What both kinds of experts are: the parameters of :class:`GroupedExperts`, and what is computed with them.

    ``GroupedExperts`` are called with rows that have arrived, :class:`foldpar.FoldedExperts` with all tokens and their
    routing. Arguments, parameters and ``from_dense`` are those of ``GroupedExperts``.
    """

    takes_rows = False
    """Whether the module itself is called with rows that have arrived."""

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        groups: FoldedGroups,
        *,
        activation: Activation = "swiglu",
        bias: bool = False,
        storage: ExpertStorage | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_sizes("GroupedExperts", num_experts=num_experts, dim=dim, hidden_dim=hidden_dim)
        expect(
            "GroupedExperts",
            groups=(groups, FoldedGroups),
            storage=(storage, (ExpertStorage, type(None))),
            dtype=(dtype, (torch.dtype, type(None))),
        )
        check_activation(activation)
        if dtype is not None and not dtype.is_floating_point:
            raise ShapeError(
                f"GroupedExperts: dtype = {dtype} must be a floating-point dtype, since weights are trained."
            )
        _divides("ep", groups.ep.size, "num_experts", num_experts)
        _divides("etp", groups.etp.size, "hidden_dim", hidden_dim)
        self.num_experts, self.dim, self.hidden_dim = num_experts, dim, hidden_dim
        self.groups, self.activation, self.storage = groups, activation, storage or ExpertStorage()
        self.local_experts = num_experts // groups.ep.size
        self.local_hidden = hidden_dim // groups.etp.size
        self.first_expert = groups.ep.index * self.local_experts
        self._parts = 2 if is_gated(activation) else 1
        self._changes: list[tuple[str, Callable[[Tensor], Tensor]]] = []
        self._units = slice(groups.etp.index * self.local_hidden, (groups.etp.index + 1) * self.local_hidden)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        columns = self._parts * self.local_hidden
        shapes = {
            self.storage.gate_up: self.storage.gate_up_shape(self.local_experts, dim, columns),
            "down_proj": self.storage.down_shape(self.local_experts, dim, self.local_hidden),
            self.storage.gate_up_bias: (self.local_experts, columns) if bias else None,
            self.storage.down_bias: (self.local_experts, dim) if bias else None,
        }
        for name, shape in shapes.items():
            own = None if shape is None else self._parameter(name, torch.empty(shape, **like))
            self.register_parameter(name, own)
        self.mark(ROUTED_EXPERT, EXPERT_BIAS)
        self.reset_parameters(seed)
        take_shares_on_load(self, groups)
        watch_optimizers(groups, self)

    @property
    def expert_parameters(self) -> frozenset[str]:
        """The names of the experts' own parameters; what else is in here came later."""
        return frozenset(self.storage.names)

    @property
    def pairs(self) -> dict[str, int]:
        """Of own parameters, by name, with a dimension for the pair of gate and up: which dimension that is."""
        if self._parts == 1 or self.storage.interleaved or self.groups.etp.size == 1:
            return {}
        dimension = self.storage.pair_dimension
        return {self.storage.gate_up: dimension(dims=3), self.storage.gate_up_bias: dimension(dims=2)}

    @property
    def is_transposed(self) -> bool:
        """Whether weights are stored ``[num_experts, in, out]``; the name is transformers' own, which adapters read."""
        return self.storage.transposed

    @contextmanager
    def changing(self, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """In it, forwards compute with ``change(share)`` in place of this rank's share of a parameter.

        The share has the usual shape, ``[local_experts, 2 * local_hidden, dim]`` of ``gate_up_proj``, and so must what
        comes back. Changes to one parameter are made one after another.
        """
        self._changes.append((name, change))
        try:
            yield
        finally:
            self._changes.pop()

    @property
    def biases(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """The biases of the two products, by whatever names they are stored; ``None`` without."""
        gate_up, down = getattr(self, self.storage.gate_up_bias), getattr(self, self.storage.down_bias)
        return None if gate_up is None else (gate_up, down)

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw every expert as ``nn.Linear`` would, from a generator keyed by ``seed`` and the global expert id."""
        seed = int(torch.randint(2**31, ()).item()) if seed is None else seed
        if self.get_parameter(self.storage.gate_up).is_meta:
            return
        gate_up_own, down_own, *biases_own = (None if each is None else each.detach() for each in self.local_weights())
        assert gate_up_own is not None and down_own is not None
        for local in range(self.local_experts):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + self.first_expert + local) % 2**63)
            gate_up = torch.empty(self._parts * self.hidden_dim, self.dim)
            gate_up.uniform_(-(self.dim**-0.5), self.dim**-0.5, generator=generator)
            down = torch.empty(self.dim, self.hidden_dim)
            down.uniform_(-(self.hidden_dim**-0.5), self.hidden_dim**-0.5, generator=generator)
            stored = self.storage.from_concatenated(gate_up[None], parts=self._parts)
            gate_up_own[local].copy_(self._gate_up_slice(stored)[0])
            down_own[local].copy_(self._down_slice(down.T[None] if self.storage.transposed else down[None])[0])
            if self.biases is not None:
                gate_up_bias, down_bias = torch.empty(len(gate_up)), torch.empty(self.dim)
                gate_up_bias.uniform_(-(self.dim**-0.5), self.dim**-0.5, generator=generator)
                down_bias.uniform_(-(self.hidden_dim**-0.5), self.hidden_dim**-0.5, generator=generator)
                stored = self.storage.from_concatenated(gate_up_bias[None], parts=self._parts)
                for own, values in zip(biases_own, (self._gate_up_slice(stored)[0], down_bias), strict=True):
                    assert own is not None
                    own[local].copy_(values)

    @classmethod
    def from_dense(
        cls,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        groups: FoldedGroups,
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: Activation = "swiglu",
        storage: ExpertStorage | None = None,
        **options: Any,
    ) -> Self:
        """Take this rank's share of all experts' weights; nothing else is copied.

        ``gate_up_proj`` is ``[num_experts, 2 * hidden_dim, dim]`` (``[num_experts, hidden_dim, dim]`` for a plain
        activation) and ``down_proj`` is ``[num_experts, dim, hidden_dim]``, or as ``storage`` says; biases, both or
        none, are ``[num_experts, 2 * hidden_dim]`` (or ``hidden_dim``) and ``[num_experts, dim]``. Device and dtype
        carry over. ``options`` are keywords of the class.

        Raises:
            ShapeError: they do not fit each other or the layout, or one bias comes without the other.
        """
        expect(
            "from_dense",
            gate_up_proj=(gate_up_proj, Tensor),
            down_proj=(down_proj, Tensor),
            groups=(groups, FoldedGroups),
        )
        check_activation(activation)
        storage = storage or ExpertStorage()
        parts = 2 if is_gated(activation) else 1
        _check_alike(gate_up_proj, down_proj, gate_up_bias, down_bias)
        if gate_up_proj.dim() != 3 or down_proj.dim() != 3:
            raise ShapeError("gate_up_proj and down_proj must have three dimensions, experts first.")
        num_experts, dim, hidden_dim = storage.for_product(down_proj).shape
        fitting = storage.gate_up_shape(num_experts, dim, parts * hidden_dim)
        if gate_up_proj.shape != fitting:
            raise ShapeError(
                f"down_proj {list(down_proj.shape)} means num_experts = {num_experts}, dim = {dim}, hidden_dim = "
                f"{hidden_dim}; then gate_up_proj must be {list(fitting)} for "
                f"{activation!r}, and is {list(gate_up_proj.shape)}."
            )
        if (gate_up_bias is None) != (down_bias is None):
            given, missing = ("down_bias", "gate_up_bias") if gate_up_bias is None else ("gate_up_bias", "down_bias")
            raise ShapeError(f"{given} is given without {missing}. Give both, or neither; zeros where a model has one.")
        options.update(activation=activation, bias=gate_up_bias is not None, storage=storage, seed=0, device="meta")
        experts = cls(num_experts, dim, hidden_dim, groups, **options)
        wholes = {
            experts.storage.gate_up: gate_up_proj,
            "down_proj": down_proj,
            storage.gate_up_bias: gate_up_bias,
            storage.down_bias: down_bias,
        }
        if gate_up_bias is not None and down_bias is not None:
            _fits("gate_up_bias", gate_up_bias, (num_experts, parts * hidden_dim))
            _fits("down_bias", down_bias, (num_experts, dim))
        for name, whole in wholes.items():
            if whole is not None:
                frozen = isinstance(whole, nn.Parameter) and not whole.requires_grad
                own = experts._share_of(name, whole.detach()).clone(memory_format=torch.contiguous_format)
                setattr(experts, name, experts._parameter(name, own, requires_grad=not frozen))
        return experts

    def compute(
        self,
        rows: Tensor,
        rows_per_expert: Tensor,
        weights: Tensor | None = None,
        sizes: tuple[int, ...] | None = None,
        places: Places | None = None,
    ) -> Tensor:
        """Compute expert-major rows: ``[sum(rows_per_expert), dim]`` to the same shape.

        ``rows_per_expert`` is ``[local_experts]``, int32, on the rows' device; experts without rows are allowed and
        get zero gradients. ``weights`` is ``[rows]``: routing weights to multiply the outputs by, which costs nothing
        here. ``sizes`` are the ``rows_per_expert`` on the host, where it knows them. With ``places``, rows and weights
        lie anywhere, and outputs are summed there: see ``grouped_feed_forward``. Where dtype and width allow it the
        product is torch's ``grouped_mm``, else one product per expert.

        Backward:
            Plain. With ``etp > 1`` the gradients of ``rows`` and ``weights`` are this slice's summands.
        """
        expect(type(self).__name__, rows=(rows, Tensor), rows_per_expert=(rows_per_expert, Tensor))
        if rows_per_expert.shape != (self.local_experts,):
            raise ShapeError(
                f"rows_per_expert must be [local experts] = [{self.local_experts}], and is "
                f"{list(rows_per_expert.shape)}."
            )
        return self.product(self._weights(), rows, rows_per_expert, weights, sizes, places)

    @classmethod
    def computes_its_own_way(cls) -> bool:
        """Whether a subclass computes something else than :attr:`product`, or what is around it."""
        return cls.compute is not ExpertShare.compute or (cls.takes_rows and cls.forward is not GroupedExperts.forward)

    @property
    def product(self) -> ExpertProduct:
        """What is computed, whatever the weights."""
        return ExpertProduct(self.activation, self.storage, adds_down_bias=self.groups.etp.index == 0)

    @property
    def abilities(self) -> Abilities:
        """What a journey may ask for; what a subclass computes takes rows grouped by expert."""
        return Abilities(not self.computes_its_own_way(), None if self.biases is None else BIASED)

    @property
    def of_rows(self) -> Callable[..., Tensor]:
        """What a journey calls with rows: the module itself, on whose call FSDP2's hooks hang, where it takes rows."""
        return self if self.takes_rows else self.compute

    def mark(self, routed: ParameterFamily, bias: ParameterFamily) -> None:
        """Say of which family the parameters are, and of which the output bias."""
        mark_parameters(self, routed)
        if self.biases is not None:
            mark_parameters(self, bias, names=(self.storage.down_bias,))

    def extra_repr(self) -> str:
        last = self.first_expert + self.local_experts - 1
        return (
            f"experts {self.first_expert}..{last} of {self.num_experts}, dim={self.dim}, "
            f"hidden {self.local_hidden} of {self.hidden_dim}, activation={self.activation!r}, "
            f"bias={self.biases is not None}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._draw_alike()  # another dtype, another tensor
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._draw_alike()  # a copy

    def _draw_alike(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not None:
                adopt(parameter)
                self._say_usual_shape(name, parameter)

    # How the parameters lie.

    def _parameter(self, name: str, own: Tensor, *, requires_grad: bool = True) -> nn.Parameter:
        """A parameter made of this rank's share, in the usual shape; shares its memory."""
        if self.groups.layout.stage_size == 1:
            return nn.Parameter(own, requires_grad=requires_grad)
        pair = self.pairs.get(name)
        own = own if pair is None else own.unflatten(pair, (self._parts, -1))
        cuts = (0, self._cut_over_etp(name))
        parameter = distributed_parameter(own, self.groups.mesh_of_shares, cuts, requires_grad=requires_grad)
        adopt(parameter)
        self._say_usual_shape(name, parameter)
        return parameter

    def _say_usual_shape(self, name: str, parameter: nn.Parameter) -> None:
        """A pair has one dimension more than the model's files: adapters read the usual shape in this attribute."""
        if (pair := self.pairs.get(name)) is not None:
            shape = parameter.shape
            usual = torch.Size((*shape[:pair], shape[pair] * shape[pair + 1], *shape[pair + 2 :]))
            parameter.ds_shape = usual  # type: ignore[attr-defined]

    def _cut_over_etp(self, name: str) -> int | None:
        """The dimension of the hidden units, wherever they lie; an output bias has none."""
        if name == self.storage.down_bias:
            return None
        if name == "down_proj":
            return 1 if self.storage.transposed else 2
        units = self.storage.pair_dimension(dims=3 if name == self.storage.gate_up else 2)
        return units + 1 if name in self.pairs else units

    def local_weights(self) -> tuple[Tensor | None, ...]:
        """This rank's shares, in the usual shape: ``gate_up_proj``, ``down_proj`` and the biases or ``None``."""
        names = self.storage.names
        pairs = self.pairs
        parts = local_parts(*(getattr(self, name) for name in names), partial_over="etp")
        if parts[1] is not None and parts[1].shape[0] != self.local_experts:
            raise ShapeError(
                f"The experts of this rank are {self.local_experts} of {self.num_experts}, and down_proj is now a "
                f"plain tensor of {parts[1].shape[0]}. Whoever replaces parameters (functional_call, an assignment) "
                f"gives DTensors like those of named_parameters(), or this rank's part; load_state_dict takes whole "
                f"tensors."
            )
        shares = {
            name: part.flatten(pairs[name], pairs[name] + 1) if part is not None and name in pairs else part
            for name, part in zip(names, parts, strict=True)
        }
        for name, change in self._changes:
            share = shares[name]
            assert share is not None
            shares[name] = change(share)
        return tuple(shares.values())

    def _weights(self) -> tuple[Tensor | None, ...]:
        """What the product is computed with: parameters as they are, where it opens them itself, else local weights."""
        if self._changes or self.storage.transposed or self.biases is not None or self.pairs:
            return self.local_weights()
        gate_up, down = (getattr(self, name) for name in self.storage.names[:2])
        ours = is_dtensor(gate_up) and is_dtensor(down) and opened(down)[0].shape[0] == self.local_experts
        return (gate_up, down, None, None) if ours else self.local_weights()

    def share_of_product(self, name: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """What this rank's share of a weight ``left @ right`` is made of: views of the factors' own parts.

        ``left`` is ``[num_experts, rows, rank]`` and ``right`` is ``[num_experts, rank, columns]``, where ``[rows,
        columns]`` is one expert's weight as it is stored.
        """
        mine = slice(self.first_expert, self.first_expert + self.local_experts)
        is_down = name == "down_proj"
        if is_down != self.storage.transposed:  # hidden units are the columns
            return left[mine], self._share_of(name, right)
        return self._share_of(name, left), right[mine]

    def _share_of(self, name: str, whole: Tensor) -> Tensor:
        """This rank's share, a view, of a tensor of the whole layer in the usual shape."""
        mine = whole[self.first_expert : self.first_expert + self.local_experts]
        if name == self.storage.down_bias:
            return mine
        return self._down_slice(mine) if name == "down_proj" else self._gate_up_slice(mine)

    def _gate_up_slice(self, stored: Tensor) -> Tensor:
        """This rank's hidden units of a ``gate_up`` weight or bias, of the gate and of the up projection."""
        return self.storage.own_gate_up(stored, parts=self._parts, units=self._units)

    def _down_slice(self, stored: Tensor) -> Tensor:
        return self.storage.own_down(stored, units=self._units)


class GroupedExperts(ExpertShare):
    """The experts that live on this rank, and of each the slice that lives here.

    Parameters are stored as most model files store them:

    - ``gate_up_proj``: ``[num_experts, 2 * hidden_dim, dim]``, gate above up; for a plain activation
      ``[num_experts, hidden_dim, dim]``, the up projection alone;
    - ``down_proj``: ``[num_experts, dim, hidden_dim]``;
    - with ``bias=True``, ``gate_up_bias``: ``[num_experts, 2 * hidden_dim]`` (``hidden_dim`` for a plain activation)
      and ``down_bias``: ``[num_experts, dim]``.

    These are the shapes of the whole layer. A rank holds ``local_experts = num_experts / ep`` experts and of each
    ``local_hidden = hidden_dim / etp`` hidden units: parameters are ``DTensor`` s over the dimensions ``("ep", "etp")``
    of ``groups.mesh("expert")``, so that whatever handles tensors sees how they lie. ``to_local()`` is this rank's
    part. Only where a stage is one rank are they plain tensors.

    A gated expert is sliced so that gate and up of one hidden unit stay on one rank. Where gate lies above up that is
    no block of the whole, so with ``etp > 1`` the two have a dimension of their own: ``[num_experts, 2, hidden_dim,
    dim]``. Checkpoints, exports and ``load_state_dict`` know the tensor by its usual shape all the same.

    With ``etp > 1`` the output is a partial sum over the slices; :func:`foldpar.combine` adds them up. So
    ``down_bias``, which every etp rank holds, is added on one of them, and its family is ``EXPERT_BIAS``. Biases are
    inside the expert: the routing weight multiplies them too.

    ``storage``, an :class:`~foldpar.ExpertStorage`, keeps the layout and the bias names of a model that stores
    its experts in another way: transposed, or with gate and up interleaved.

    Values are drawn per *global* expert from ``seed``, so one seed gives the same model in every layout. ``seed=None``
    takes one number from torch's default generator: equal on all ranks after equal ``torch.manual_seed``.

    Raises:
        ShapeError: ``ep`` does not divide ``num_experts``, or ``etp`` does not divide ``hidden_dim``.

    Source: SwiGLU: Shazeer 2020; grouped products: MegaBlocks (Gale et al. 2022), section 4.
    """

    takes_rows = True

    def forward(
        self,
        rows: Tensor,
        rows_per_expert: Tensor,
        weights: Tensor | None = None,
        sizes: tuple[int, ...] | None = None,
        places: Places | None = None,
    ) -> Tensor:
        """:meth:`compute`: ``[sum(rows_per_expert), dim]`` to the same shape."""
        return self.compute(rows, rows_per_expert, weights, sizes, places)


@dataclass(frozen=True, slots=True)
class ExpertProduct:
    """What experts compute, apart from their weights.

    ``adds_down_bias``: slices are summed over ``etp``, so one of them adds the output bias.
    """

    activation: Activation
    storage: ExpertStorage
    adds_down_bias: bool

    def __call__(
        self,
        parameters: tuple[Tensor | None, ...],
        rows: Tensor,
        rows_per_expert: Tensor,
        weights: Tensor | None = None,
        sizes: tuple[int, ...] | None = None,
        places: Places | None = None,
    ) -> Tensor:
        """As :meth:`ExpertShare.compute`, with ``gate_up_proj``, ``down_proj`` and the biases or ``None``."""
        gate_up_proj, down_proj, gate_up_bias, down_bias = parameters
        assert gate_up_proj is not None and down_proj is not None
        # Where it is not added its gradient is zero, not None.
        once = None if down_bias is None else down_bias * self.adds_down_bias
        return grouped_feed_forward(
            rows,
            self.storage.for_product(gate_up_proj),
            self.storage.for_product(down_proj),
            rows_per_expert.cumsum(0, dtype=torch.int32) if places is None else places.ends,
            self.activation,
            weights=weights,
            gate_up_bias=gate_up_bias,
            down_bias=once,
            sizes=sizes,
            interleaved=self.storage.interleaved,
            places=places,
        )


def _divides(degree: str, value: int, name: str, total: int) -> None:
    uneven = not_dividing(degree, value, name, total)
    if uneven is not None:
        raise ShapeError(uneven)


def _fits(name: str, bias: Tensor, shape: tuple[int, int]) -> None:
    if bias.shape != shape:
        raise ShapeError(f"{name} must be {list(shape)}, a number per output, and is {list(bias.shape)}.")


def _check_alike(*weights: Tensor | None) -> None:
    """Raise unless all weights are floating point, of one dtype and on one device."""
    given = [weight for weight in weights if weight is not None]
    kinds = {(weight.dtype, weight.device) for weight in given}
    if len(kinds) > 1 or not given[0].is_floating_point():
        raise ShapeError(
            f"The weights and biases of experts must be floating point, of one dtype and on one device; these are "
            f"{', '.join(f'{weight.dtype} on {weight.device}' for weight in given)}. Convert them first."
        )
