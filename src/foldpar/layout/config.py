"""``FoldingConfig``: the degrees of a layout as a configuration file says them, foldpar's own or another library's.

Everything is checked before a process group exists: what a file says when it is read, and the numbers of a world and a
model in :meth:`FoldingConfig.validate`. Every rank reads the same configuration, so every rank raises the same error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import gcd, lcm
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from foldpar.errors import LayoutError
from foldpar.layout.foreign_configs import (
    DERIVED,
    MODEL_TYPES_OF_PRESET,
    SECTIONS,
    Reading,
    check_keys,
    near_a_section,
    raise_faults,
    read_deepspeed,
    read_megatron,
    read_torchtitan,
    read_transformers,
)
from foldpar.layout.layout import ORDERS, FoldedLayout, Order, solve_layout
from foldpar.wording import as_integer, divisors, listed

__all__ = ["FoldingConfig"]

_Lanes = Literal["replicated", "sharded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldingConfig:
    """The degrees of a layout, and what else a configuration asks of it; ``dp`` and ``edp`` follow from the world.

    A plain value: it compares, hashes and pickles, and what it says is what :meth:`to_dict` says. Constructed from
    keywords, from foldpar's own section (:meth:`from_dict`, :meth:`from_json`), or from what DeepSpeed (the same two),
    Megatron-Core (:meth:`from_megatron`), transformers (:meth:`from_transformers`) and TorchTitan
    (:meth:`from_torchtitan`) are configured with.

    Args:
        tp: as in :func:`foldpar.solve_layout`; so are ``ep``, ``etp``, ``pp``, ``cp`` and ``order``.
        lanes: ``"sharded"`` where the lanes of a TP group hold slices of the tokens (sequence parallelism). It is no
            part of the layout: pass it to ``FoldedMoE(..., lanes=config.lanes)``.
        preset: the model family that a DeepSpeed configuration names; compared with the model's own type.
        world: how many ranks the configuration is for, where it says so. It must be the number that there are.
        origins: who said what, as pairs of a field and a key of another configuration. Not compared.
        not_used: what the other configuration says and foldpar does not use, with the reason. Not compared.

    Example:
        >>> config = FoldingConfig.from_dict(
        ...     {
        ...         "tensor_parallel": {"autotp_size": 2},
        ...         "expert_parallel": {"enabled": True, "autoep_size": 4, "preset_model": "mixtral"},
        ...         "bf16": {"enabled": True},
        ...     }
        ... )
        >>> config.layout(8)
        FoldedLayout(world=8, tp=2, ep=4, etp=1, pp=1, cp=1, order='consecutive')
        >>> config.not_used
        ("bf16: not foldpar's",)
        >>> config.validate(8, num_experts=6, num_heads=32, model_type="mixtral")
        Traceback (most recent call last):
        foldpar.errors.LayoutError: ep = 4 does not divide num_experts = 6: all ranks of an EP group hold equally many \
experts. With etp = 1 and num_experts = 6, ep can be 1 or 2. Here ep is expert_parallel.autoep_size.

    Raises:
        LayoutError: a degree is not a positive integer, or another field is not one of its choices.
    """

    tp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1
    cp: int = 1
    order: Order = "tp-lane-major"
    lanes: _Lanes = "replicated"
    preset: str | None = None
    world: int | None = None
    origins: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)
    not_used: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        faults = []
        for name in (*_DEGREES, "world"):
            value = getattr(self, name)
            size = as_integer(value)
            if size is not None and size > 0:
                object.__setattr__(self, name, size)
            elif name != "world" or value is not None:
                faults.append(_not_positive(name, value) + self._here(name))
        for name, choices in (("order", ORDERS), ("lanes", get_args(_Lanes)), ("preset", _PRESETS)):
            value = getattr(self, name)
            if value not in choices:
                known = listed([choice for choice in choices if choice is not None])
                faults.append(f"{name} = {value!r} is unknown: it can be {known}." + self._here(name))
        raise_faults(faults, "This configuration")

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> FoldingConfig:
        """A configuration from foldpar's own keys, or from a whole file with sections.

        Args:
            document: the fields themselves, as :meth:`to_dict` gives them; or sections: ``"foldpar"`` with the fields,
                and DeepSpeed's ``"tensor_parallel"`` and ``"expert_parallel"`` as they are. DeepSpeed's ranks are in
                ``"consecutive"`` order. What it has no key for (``pp``, ``cp``, ``order``, ``lanes``, ``world``) can
                stand in ``"foldpar"``. All other sections are listed in :attr:`not_used`.

        Example:
            >>> FoldingConfig.from_dict({"tp": 2, "ep": 4}) == FoldingConfig(tp=2, ep=4)
            True
            >>> FoldingConfig.from_dict({"tp": 2, "ep": 4, "dp": 4})
            Traceback (most recent call last):
            foldpar.errors.LayoutError: 'dp' in the configuration cannot be given: dp is derived. tp * cp * dp == \
ep * etp * edp == stage_size cannot be broken only because dp and edp are what remains. Leave it out; \
layout(world).dp says what it is.

        Raises:
            LayoutError: an unknown key in a section that is read (the nearest known one is named), ``dp`` or ``edp``,
                sections that contradict each other, an option that would change what the model computes. One error
                lists everything that is wrong.
        """
        if not isinstance(document, Mapping):
            raise LayoutError(f"A configuration is an object of keys and values, not {document!r}.")
        return cls._from(_read_document(document))

    @classmethod
    def from_json(cls, path_or_text: str | PathLike[str]) -> FoldingConfig:
        """:meth:`from_dict` of a JSON file, or of JSON text: a string that starts with ``{``.

        Example:
            >>> FoldingConfig.from_json('{"foldpar": {"tp": 2, "ep": 4, "pp": 2}}')
            FoldingConfig(tp=2, ep=4, etp=1, pp=2, cp=1, order='tp-lane-major', lanes='replicated', preset=None, \
world=None)

        Raises:
            LayoutError: not JSON, a key that stands twice, or what :meth:`from_dict` refuses.
            OSError: the file cannot be read.
        """
        is_text = isinstance(path_or_text, str) and path_or_text.lstrip().startswith("{")
        text = str(path_or_text) if is_text else Path(path_or_text).read_text(encoding="utf-8")
        where = "This text" if is_text else str(path_or_text)
        try:
            document = json.loads(text, object_pairs_hook=_without_repetition)
        except json.JSONDecodeError as error:
            raise LayoutError(
                f"{where} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}. Comments and trailing "
                f"commas, which DeepSpeed reads, are not JSON."
            ) from error
        return cls.from_dict(document)

    @classmethod
    def from_megatron(cls, source: object) -> FoldingConfig:
        """A configuration from Megatron-Core's: a ``ModelParallelConfig``, argparse's arguments, or a mapping.

        ``expert_tensor_parallel_size`` that is absent or ``None`` means ``tp``, as there. Ranks are in
        ``"consecutive"`` order; ``sequence_parallel`` is ``lanes="sharded"``; ``data_parallel_size`` and
        ``world_size``, where there, say the world.

        Example:
            >>> config = FoldingConfig.from_megatron(
            ...     {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4, "sequence_parallel": True}
            ... )
            >>> config.tp, config.ep, config.etp, config.order, config.lanes
            (2, 4, 2, 'consecutive', 'sharded')

        Raises:
            LayoutError: sizes that are none or contradict each other, a misspelled size, a rank order that
                ``"consecutive"`` is not, an encoder with ranks of its own.
        """
        return cls._from(read_megatron(source))

    @classmethod
    def from_transformers(cls, source: object) -> FoldingConfig:
        """A configuration from transformers' ``DistributedConfig``, or from its dictionary.

        Its meshes count ranks in ``"consecutive"`` order. ``dp`` is ``dp_replicate_size * fsdp_size`` there and
        derived here: the product of all its sizes is kept as ``world``, which must be the world that there is.

        Example:
            >>> config = FoldingConfig.from_transformers({"tp_size": 2, "fsdp_size": 4, "ep_size": 4})
            >>> config.layout(8).dp, config.layout(8).edp
            (4, 2)

        Raises:
            LayoutError: an unknown key, a size that is none or is left to the environment, or an option that does
                nothing there.
        """
        return cls._from(read_transformers(source))

    @classmethod
    def from_torchtitan(cls, source: object) -> FoldingConfig:
        """A configuration from TorchTitan's ``ParallelismConfig``, or from a mapping of its fields.

        What a mapping does not say has its default there. Its meshes count ranks in ``"consecutive"`` order;
        ``enable_sequence_parallel``, on by default, is ``lanes="sharded"``. Where ``expert_parallel_degree`` is 1 it
        cuts the experts over tensor parallelism, so ``etp`` is ``tp`` then, and 1 otherwise.
        ``data_parallel_shard_degree`` says the world, unless it is -1, the default: the ranks that are left.

        Example:
            >>> config = FoldingConfig.from_torchtitan({"tensor_parallel_degree": 2, "expert_parallel_degree": 4})
            >>> config.tp, config.ep, config.etp, config.lanes, config.world
            (2, 4, 1, 'sharded', None)

        Raises:
            LayoutError: an unknown key, a degree that is none, or a whole configuration instead of its part.
        """
        return cls._from(read_torchtitan(source))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data for JSON; :meth:`from_dict` gives an equal configuration back.

        Example:
            >>> FoldingConfig(tp=2, ep=4).to_dict()
            {'tp': 2, 'ep': 4, 'etp': 1, 'pp': 1, 'cp': 1, 'order': 'tp-lane-major', 'lanes': 'replicated'}
        """
        said = {name: getattr(self, name) for name in _FIELDS}
        return {name: value for name, value in said.items() if value is not None}

    def to_deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's sections ``tensor_parallel`` and ``expert_parallel``; :meth:`from_dict` reads them back.

        ``world`` is not said. DeepSpeed 0.19.8 itself refuses some of it when it starts: ``etp > 1``, and ``ep = 1``
        with ``tp > 1``.

        Example:
            >>> FoldingConfig(tp=2, ep=4, order="consecutive").to_deepspeed()["tensor_parallel"]
            {'autotp_size': 2}

        Raises:
            LayoutError: DeepSpeed has no key for it: ``pp``, ``cp``, sharded lanes, or ``"tp-lane-major"`` with lanes.
        """
        faults = self._order_faults("DeepSpeed")
        for name, only in (("pp", 1), ("cp", 1), ("lanes", "replicated")):
            if getattr(self, name) != only:
                faults.append(
                    f"{name} = {getattr(self, name)!r} has no key beside tensor parallelism in a DeepSpeed "
                    f"configuration, so only {name} = {only!r} can be written."
                )
        raise_faults(faults, "This configuration")
        expert = {
            "enabled": self.ep * self.etp > 1,
            "autoep_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
        }
        preset = {} if self.preset is None else {"preset_model": self.preset}
        return {"tensor_parallel": {"autotp_size": self.tp}, "expert_parallel": {**expert, **preset}}

    def to_megatron(self) -> dict[str, Any]:
        """Arguments of Megatron-Core's ``ModelParallelConfig``; :meth:`from_megatron` reads them back.

        ``world`` and ``preset`` are not said, nor are sharded lanes where there is one lane.

        Example:
            >>> FoldingConfig(tp=2, ep=4, order="consecutive").to_megatron()["expert_tensor_parallel_size"]
            1

        Raises:
            LayoutError: Megatron-Core has no such order: ``"tp-lane-major"`` with lanes.
        """
        raise_faults(self._order_faults("Megatron-Core"), "This configuration")
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "sequence_parallel": self.lanes == "sharded" and self.tp > 1,
        }

    def layout(self, world: int | None = None) -> FoldedLayout:
        """The layout of ``world`` ranks; ``None`` takes the configuration's own ``world``.

        Example:
            >>> FoldingConfig(tp=2, ep=4).layout(4)
            FoldedLayout(world=4, tp=2, ep=4, etp=1, pp=1, cp=1, order='tp-lane-major')

        Raises:
            LayoutError: as :meth:`validate`.
        """
        self.validate(world)
        given = self._world(world)
        return solve_layout(given, tp=self.tp, ep=self.ep, etp=self.etp, pp=self.pp, cp=self.cp, order=self.order)

    def validate(
        self,
        world: int | None = None,
        *,
        num_experts: int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        expert_hidden: int | None = None,
        model_type: str | None = None,
    ) -> None:
        """Check the degrees against a world and, as far as they are given, the numbers of a model.

        Needs no process group and no torch: call it before anything is started.

        Args:
            world: how many ranks there are; ``None`` takes the configuration's own ``world``.
            num_experts: routed experts of a layer, which ``ep`` divides.
            num_heads: attention heads, which ``tp`` divides.
            num_kv_heads: heads of keys and values, which ``tp`` divides; leave it out where they are replicated.
            expert_hidden: the hidden size inside one routed expert, which ``etp`` divides.
            model_type: what the model calls itself (``model.config.model_type``), compared with ``preset``.

        Example:
            >>> FoldingConfig(tp=4, ep=3).validate(8, num_heads=6, num_experts=9)
            Traceback (most recent call last):
            foldpar.errors.LayoutError: This configuration has 2 faults:
              1. ep * etp = 3 * 1 = 3 does not divide stage_size = 8, so edp would not be whole. With etp = 1 and \
num_experts = 9, ep can be 1.
              2. tp = 4 does not divide num_heads = 6: a lane holds whole heads. With cp = 1 and num_heads = 6, \
tp can be 1 or 2.

        Raises:
            LayoutError: everything that does not fit, in one error, each with the values that would.
        """
        given = self._world(world)
        facts = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "num_experts": num_experts}
        facts["expert_hidden"] = expert_hidden
        faults = [_not_positive(name, value) for name, value in facts.items() if value is not None and not _ok(value)]
        known = {name: value for name, value in facts.items() if value is not None and _ok(value)}
        faults += self._world_faults(given)
        faults += self._division_faults(given, known)
        faults += self._model_faults(given, known)
        types = MODEL_TYPES_OF_PRESET.get(self.preset or "", ())
        if self.preset is not None and model_type is not None and model_type not in types:
            faults.append(
                f"preset = {self.preset!r} is for model_type {listed(types)}, but the model's is {model_type!r}: one "
                f"of them is of another run.{_preset_advice(model_type)}" + self._here("preset")
            )
        raise_faults(faults, "This configuration")

    def report(self) -> str:
        """What was taken from where, and what was not used and why; for a log, on one rank.

        Example:
            >>> print(FoldingConfig.from_dict({"tensor_parallel": {"autotp_size": 2}, "fp16": {}}).report())
            tp = 2 (tensor_parallel.autotp_size)
            ep = 1
            etp = 1
            pp = 1
            cp = 1
            order = 'consecutive' (DeepSpeed's rank tables)
            lanes = 'replicated'
            not used
              fp16: not foldpar's
        """
        origins = dict(self.origins)
        lines = [
            f"{name} = {value!r}" + (f" ({origins[name]})" if name in origins else "")
            for name, value in self.to_dict().items()
        ]
        return "\n".join(lines + ["not used"] * bool(self.not_used) + [f"  {line}" for line in self.not_used])

    @classmethod
    def _from(cls, reading: Reading) -> FoldingConfig:
        raise_faults(reading.faults, "This configuration")
        values: dict[str, Any] = reading.values
        return cls(**values, origins=tuple(reading.origins.items()), not_used=tuple(reading.not_used))

    def _here(self, *names: str) -> str:
        """A sentence that says which keys of another configuration the fields are; empty for foldpar's own."""
        origins = dict(self.origins)
        said = [f"{name} is {origins[name]}" for name in names if name in origins]
        return f" Here {' and '.join(said)}." if said else ""

    def _order_faults(self, library: str) -> list[str]:
        if self.order == "consecutive" or self.tp == 1:  # with one lane, both orders are the same
            return []
        return [
            f"order = {self.order!r} with tp = {self.tp} is not an order of {library}, whose expert groups are "
            f"neighbouring ranks: only order = 'consecutive' can be written."
        ]

    def _world(self, world: int | None) -> int:
        given = self.world if world is None else world
        if given is None:
            raise LayoutError(
                "How many ranks there are is not known: the configuration does not say it, so pass world, for example "
                "torch.distributed.get_world_size()."
            )
        if not _ok(given):
            raise LayoutError(_not_positive("world", given))
        return given

    def _world_faults(self, world: int) -> list[str]:
        if self.world is None or self.world == world:
            return []
        taken = self.pp * self.tp * self.cp
        whole = world % taken == 0 and self.world % taken == 0
        then = f" dp would be {world // taken}, not {self.world // taken}." if whole else ""
        return [
            f"world = {world}, but the configuration is for {self.world} ranks.{then} Start {self.world}, or change "
            f"what it says." + self._here("world")
        ]

    def _division_faults(self, world: int, facts: Mapping[str, int]) -> list[str]:
        if world % self.pp:
            taken = lcm(self.tp * self.cp, self.ep * self.etp)
            whole = world // taken if world % taken == 0 else world
            return [
                f"pp = {self.pp} does not divide world = {world}, so the stages would not be of one size. It can be "
                f"{listed(divisors(whole))}." + self._here("pp")
            ]
        stage, faults = world // self.pp, []
        made_of = f" (world / pp = {world} / {self.pp})" if self.pp > 1 else ""
        for first, second, rest in (("tp", "cp", "dp"), ("ep", "etp", "edp")):
            sizes = getattr(self, first), getattr(self, second)
            if stage % (sizes[0] * sizes[1]):
                advice = "".join(
                    self._advice(name, stage, facts)
                    for name, partner in ((first, sizes[1]), (second, sizes[0]))
                    if stage % partner == 0
                )
                faults.append(
                    f"{first} * {second} = {sizes[0]} * {sizes[1]} = {sizes[0] * sizes[1]} does not divide stage_size "
                    f"= {stage}{made_of}, so {rest} would not be whole."
                    + (advice or f" Each must divide it: {listed(divisors(stage))}.")
                    + self._here(first, second)
                )
        return faults

    def _model_faults(self, world: int, facts: Mapping[str, int]) -> list[str]:
        stage = world // self.pp if world % self.pp == 0 else 0
        return [
            f"{name} = {getattr(self, name)} does not divide {fact} = {facts[fact]}: {why}."
            + self._advice(name, stage, facts)
            + self._here(name)
            for name, fact, why in _MODEL_RULES
            if fact in facts and facts[fact] % getattr(self, name)
        ]

    def _advice(self, name: str, stage: int, facts: Mapping[str, int]) -> str:
        """A sentence with the values of one degree that fit the stage, its partner and the model, all at once."""
        partner = _PARTNER[name]
        size = getattr(self, partner)
        whole, given = (stage // size, [f"{partner} = {size}"]) if stage % size == 0 and stage else (0, [])
        for _, fact, _ in (rule for rule in _MODEL_RULES if rule[0] == name and rule[1] in facts):
            whole = gcd(whole, facts[fact])
            given.append(f"{fact} = {facts[fact]}")
        return f" With {' and '.join(given)}, {name} can be {listed(divisors(whole))}."


_DEGREES = ("tp", "ep", "etp", "pp", "cp")
_FIELDS = tuple(each.name for each in fields(FoldingConfig) if each.compare)
_PRESETS = (None, *sorted(MODEL_TYPES_OF_PRESET))
_PARTNER = {"tp": "cp", "cp": "tp", "ep": "etp", "etp": "ep"}
_MODEL_RULES = (
    ("ep", "num_experts", "all ranks of an EP group hold equally many experts"),
    ("etp", "expert_hidden", "the slices of an expert are of one size"),
    ("tp", "num_heads", "a lane holds whole heads"),
    ("tp", "num_kv_heads", "a lane holds whole heads, of keys and values too"),
)
# The words of other libraries for foldpar's fields.
_WORDS = {
    **dict.fromkeys(("tp_size", "tensor_parallel_size", "tensor_model_parallel_size", "autotp_size"), "tp"),
    **dict.fromkeys(("ep_size", "expert_parallel_size", "expert_model_parallel_size", "autoep_size"), "ep"),
    **dict.fromkeys(("etp_size", "expert_tensor_parallel_size"), "etp"),
    **dict.fromkeys(("pp_size", "pipeline_parallel_size", "pipeline_model_parallel_size"), "pp"),
    **dict.fromkeys(("cp_size", "context_parallel_size", "sequence_parallel_size"), "cp"),
    **dict.fromkeys(("sequence_parallel", "enable_sequence_parallel"), "lanes"),
    "preset_model": "preset",
    "world_size": "world",
}


def _read_document(document: Mapping[str, Any]) -> Reading:
    """foldpar's own keys, or sections."""
    reading = Reading()
    if not any(name in document for name in SECTIONS):
        misspelled = {str(name): near for name in document if (near := near_a_section(str(name)))}
        ours = [name for name in document if name in _FIELDS or name in _WORDS or name in DERIVED]
        if misspelled:
            reading.faults += [
                f"There is a section {name!r}: did you mean {near!r}?" for name, near in misspelled.items()
            ]
        elif document and not ours:
            reading.faults.append(
                f"There is nothing for foldpar in {listed(sorted(map(str, document)))}: neither a section "
                f"{listed(SECTIONS)} nor a key {listed(_FIELDS)}."
            )
        else:
            _read_own("the configuration", document, reading)
        return reading
    reading = read_deepspeed(document)
    if "tensor_parallel" not in document and "expert_parallel" not in document:
        del reading.values["order"], reading.origins["order"]
    for name in (name for name in document if name in _FIELDS):
        reading.not_used.remove(f"{name}: not foldpar's")
        reading.faults.append(f"{name!r} stands beside sections, so it would not be read: put it into 'foldpar'.")
    _read_own("'foldpar'", document.get("foldpar", {}), reading)
    return reading


def _read_own(where: str, section: object, reading: Reading) -> None:
    """foldpar's own keys over what other sections said: they add to it, and may not contradict it."""
    if not isinstance(section, Mapping):
        reading.faults.append(f"The section {where} is {section!r}; it must be an object of keys and values.")
        return
    check_keys(where, section, _FIELDS, reading, words=_WORDS)
    for name, value in section.items():
        if name in reading.values and name != "order" and reading.values[name] != value:
            reading.faults.append(
                f"{name} = {value!r} in {where} contradicts {reading.origins[name]}, which says "
                f"{reading.values[name]!r}. Say it once."
            )
        elif name in _FIELDS:
            reading.values[name] = value
            reading.origins.pop(name, None)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that stands twice would silently lose its first value."""
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise LayoutError(f"{listed(twice)} stands twice in one object, and only the last would count: say it once.")
    return document


def _ok(value: object) -> bool:
    size = as_integer(value)
    return size is not None and size > 0


def _not_positive(name: str, value: object) -> str:
    kind = "" if type(value) is int else f", of type {type(value).__name__},"
    return f"{name} = {value!r}{kind} is not a positive integer."


def _preset_advice(model_type: str) -> str:
    for preset, types in MODEL_TYPES_OF_PRESET.items():
        if model_type in types:
            return f" The preset of this model is {preset!r}."
    return " There is no preset for it: leave it out, and fold_model looks at the model itself."
