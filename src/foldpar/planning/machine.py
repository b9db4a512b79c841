"""``Machine``: what a plan has to know of the GPUs, as numbers in SI units, each with where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

from foldpar.errors import FoldingError
from foldpar.planning.documents import read_object

__all__ = ["SHIPPED", "HostCost", "Link", "Machine", "read_machine"]

_FOLDER = Path(__file__).parent / "machines"
SHIPPED = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))
"""The machines that a name is enough for."""


class MachineError(FoldingError, ValueError):
    """A machine file that does not say what a plan needs."""


@dataclass(frozen=True, slots=True)
class Link:
    """A link of one rank: seconds before the first byte of a collective, then bytes a second out of the rank."""

    latency: float
    bandwidth: float

    def seconds(self, sent: float, times: float = 1.0) -> float:
        """Seconds for ``times`` collectives in which the rank sends so many bytes in all."""
        return times * self.latency + sent / self.bandwidth if sent > 0 else 0.0


@dataclass(frozen=True, slots=True)
class HostCost:
    """Seconds that the host needs to launch things, forward and backward together; half of it each."""

    attention: float
    """Of one layer's attention with its norms."""
    dense: float
    """Of one dense feed-forward network."""
    moe: float
    """Of one MoE block on one rank."""
    head: float
    """Of what is in no layer: embedding, head and loss."""
    messages: float
    """What an exchange in messages adds to a block."""
    one_sided: float
    """What a one-sided exchange adds."""
    slices: float
    """What sharing the slices of experts over ``etp`` adds."""
    lanes: float
    """What cutting an attention or a feed-forward network over ``tp`` adds to it."""
    ends: float
    """What the lanes' ends of an MoE block add."""
    unit: float
    """Of one unit of ``shard_model``: its gather, and the sum of its gradients."""
    regather: float
    """Of the second gather of a unit, at stage 3."""
    conversion: float
    """Of a layer's experts that are converted for a forward and its backward, instead of a unit."""
    reduction: float
    """Of one parameter in ``reduce_gradients``."""
    bucket: float
    """What its way through a bucket adds."""
    parameter: float
    """Of one parameter in the optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """GPUs of one kind in nodes: rates, bytes and links.

    Read one with :func:`foldpar.planning.read_machine`; :func:`foldpar.planning.calibrate` measures one.

    Attributes:
        name, gpu: what it is called.
        device: ``"cuda"`` or ``"cpu"``.
        gpus_per_node: GPUs that the faster link joins.
        memory: bytes of one GPU; ``reserved`` of them are taken by the context, NCCL and fragmentation.
        peak_flops: the maker's FLOP/s in bfloat16, which MFU is a part of.
        product_flops, grouped_flops, attention_flops: FLOP/s of large dense products, of large grouped ones, and of
            fused attention.
        memory_bandwidth: bytes a second, read and written.
        elementwise_bandwidth: those of eager norms and rotations, whose kernels broadcast and reduce.
        update_bandwidth: those of the optimizer, which goes over lists of tensors.
        node, network: the links inside a node and between nodes.
        ring: what a gather or a sum over the ranks of a node gets out of the link; ``scatter`` what a sum into shards
            does.
        host: what launching costs.
        overlap: the part of the computation behind which gathers and reductions of shards can hide.
        sources: where each number comes from.
        measured: the points that the numbers were made of.
    """

    name: str
    gpu: str
    device: str = "cuda"
    gpus_per_node: int
    memory: float
    reserved: float
    peak_flops: float
    product_flops: float
    grouped_flops: float
    attention_flops: float
    memory_bandwidth: float
    elementwise_bandwidth: float
    update_bandwidth: float
    node: Link
    ring: Link
    scatter: Link
    network: Link
    host: HostCost
    overlap: float = 0.6
    sources: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)
    measured: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which :func:`foldpar.planning.read_machine` takes."""
        return {**asdict(self), "sources": dict(self.sources), "measured": dict(self.measured)}

    @property
    def hopper(self) -> bool:
        """GPUs that run the own products of :mod:`foldpar.moe`."""
        return self.device == "cuda" and any(name in self.gpu for name in ("H100", "H200", "H800", "H20", "GH200"))

    @property
    def usable(self) -> float:
        """Bytes of one GPU that a training step can have."""
        return self.memory - self.reserved


def read_machine(source: str | PathLike[str] | Mapping[str, Any]) -> Machine:
    """A machine by the name of a shipped one, from a JSON file, or from its contents.

    Example:
        >>> machine = read_machine("h100")
        >>> machine.gpu, machine.gpus_per_node
        ('NVIDIA H100 80GB HBM3', 8)

    Raises:
        ValueError: no such machine or file, or a number that is missing, unknown or none.
    """
    if isinstance(source, Mapping):
        return _machine(source, "the machine")
    if not isinstance(source, (str, PathLike)):
        raise MachineError(f"A machine is one of {', '.join(SHIPPED)}, a JSON file, or a Machine; and not {source!r}.")
    path = _FOLDER / f"{source}.json" if source in SHIPPED else Path(source)
    if not path.is_file():
        near = get_close_matches(str(source), SHIPPED, 1, 0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise MachineError(
            f"{source} is neither a machine that is known ({', '.join(SHIPPED)}{hint}) nor a file. "
            f"Write one where the GPUs are: foldpar calibrate FILE."
        )
    return _machine(read_object(path, MachineError), str(path))


def _machine(document: Mapping[str, Any], where: str) -> Machine:
    values = _checked(Machine, document, where)
    for name, kind in (
        ("node", Link),
        ("ring", Link),
        ("scatter", Link),
        ("network", Link),
        ("host", HostCost),
    ):
        if not isinstance(values[name], Mapping):
            raise MachineError(f"{where}: {name} is an object of numbers, and not {values[name]!r}.")
        values[name] = kind(**_checked(kind, values[name], f"{where}: {name}"))
    machine = Machine(**values)
    if machine.device not in ("cuda", "cpu"):
        raise MachineError(f"{where}: device = {machine.device!r} can be 'cuda' or 'cpu'.")
    if machine.overlap > 1:
        raise MachineError(f"{where}: overlap = {machine.overlap} is a part of the computation, from 0 to 1.")
    if machine.usable <= 0:
        raise MachineError(
            f"{where}: of memory = {machine.memory:g} bytes, reserved = {machine.reserved:g} leaves none to train with."
        )
    return machine


_UNITS = "bytes, seconds, and bytes or FLOPs a second"


def _range(kind: type, name: str) -> tuple[float, float]:
    """What a number can be: seconds up to an hour; bytes, rates and counts."""
    if kind is HostCost or name in ("latency", "overlap"):
        return 0, 3600
    return (0 if name == "reserved" else 1), 1e24


_TEXTS, _OPTIONAL, _MAPPINGS = (
    ("name", "gpu", "device"),
    ("device", "overlap", "sources", "measured"),
    ("sources", "measured"),
)


def _checked(kind: type, document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a class, all there, none besides, numbers where numbers belong."""
    names = [each.name for each in fields(kind)]
    for name in document:
        if name not in names:
            near = get_close_matches(str(name), names, 1)
            raise MachineError(f"{where}: {name!r} is not known{f'; did you mean {near[0]!r}?' if near else ''}")
    if missing := [name for name in names if name not in document and name not in _OPTIONAL]:
        raise MachineError(f"{where}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing.")
    for name, value in document.items():
        if name in _TEXTS:
            if not isinstance(value, str):
                raise MachineError(f"{where}: {name} = {value!r} is not a text.")
        elif name in _MAPPINGS:
            if not isinstance(value, Mapping):
                raise MachineError(f"{where}: {name} is an object, and not {value!r}.")
            if name == "sources" and not all(isinstance(source, str) for source in value.values()):
                raise MachineError(f"{where}: {name} holds a text for each number, and not {value!r}.")
        elif name not in ("node", "ring", "scatter", "network", "host"):
            zero = name == "reserved" or kind is HostCost or name in ("overlap", "latency")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (value >= 0 if zero else value > 0):
                raise MachineError(f"{where}: {name} = {value!r} is not a {'number' if zero else 'positive number'}.")
            least, most = _range(kind, name)
            if not least <= value <= most:
                raise MachineError(f"{where}: {name} = {value!r} is not from {least:g} to {most:g}, in {_UNITS}.")
            if name == "gpus_per_node" and not isinstance(value, int):
                raise MachineError(f"{where}: gpus_per_node = {value!r} is not a whole number.")
    return dict(document)
