"""Process groups of a layout: the thin adapter over ``torch.distributed``.

A layout says which ranks form a group and in which order; this module makes the communicators, in that very order. So
the *coordinate* (the position on an axis), the *rank inside the process group* and the *place on a device mesh* are one
number in every layout, also where a group does not ascend.
"""

from __future__ import annotations

import os
import secrets
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Literal, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import Self

from foldpar.arguments import expect
from foldpar.comm.c10d import GroupFactory, default_store, forget_meshes, next_generation, start_from_environment
from foldpar.errors import FoldingError, GroupsError, LayoutError
from foldpar.layout import AXES, Coordinate, FoldedLayout, solve_layout

Made = TypeVar("Made")
OneKept = TypeVar("OneKept", bound="Kept")

_VIEW_AXES: Mapping[str, tuple[str, ...]] = {
    "dense": ("pp", "dp", "cp", "tp"),
    "expert": ("pp", "edp", "ep", "etp"),
}


@dataclass(frozen=True, slots=True, eq=False)
class AxisGroup:
    """The ranks that share everything but their coordinate on one axis; what the building blocks take.

    ``ranks`` are in coordinate order and need not ascend: the EP group of world 4, TP2/EP4 is ``(0, 2, 1, 3)``.
    ``index`` is this rank's coordinate, so ``ranks[index]`` is this rank; it is also the rank inside the process group.
    ``process_group`` is ``None`` exactly when the group has one member, and then every building block is a local
    operation.

    Raises:
        GroupsError: the index is outside the group, a group of several ranks comes without a process group, or the
            process group lists its ranks in another order.
    """

    axis: str
    ranks: tuple[int, ...]
    index: int
    process_group: ProcessGroup | None = field(repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.index < len(self.ranks):
            raise GroupsError(f"index {self.index} is outside the {self.axis} group of {len(self.ranks)} rank(s).")
        if self.process_group is None and len(self.ranks) > 1:
            raise GroupsError(f"The {self.axis} group {self.ranks} has several ranks and needs a process group.")
        if self.process_group is not None:
            listed = tuple(dist.get_process_group_ranks(self.process_group))
            if listed != self.ranks:
                raise GroupsError(
                    f"The {self.axis} group is {self.ranks} in coordinate order, but its process group lists its ranks "
                    f"as {listed}: chunks would go to the wrong ranks. torch.distributed.new_group sorts ranks; let "
                    f"foldpar.create_groups make the groups, or give ranks in the process group's order."
                )

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return len(self.ranks)

    def __deepcopy__(self, memo: object) -> Self:
        return self  # a copied module talks over the same communicators

    def __copy__(self) -> Self:
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[str, tuple[int, ...], int, None]]:
        if self.process_group is not None:
            raise GroupsError(_NOT_PICKLED.format(f"The {self.axis} group"))
        return type(self), (self.axis, self.ranks, self.index, None)

    @classmethod
    def from_process_group(cls, process_group: ProcessGroup, axis: str = "group") -> Self:
        """Wrap a process group that the caller owns, so that the building blocks can use it.

        Coordinates are then the ranks inside the process group.
        """
        ranks = tuple(dist.get_process_group_ranks(process_group))
        return cls(axis, ranks, ranks.index(dist.get_rank()), process_group if len(ranks) > 1 else None)


class Kept:
    """What is made once for some groups and lives as long as they do; get it with :meth:`FoldedGroups.keep`."""

    def __init__(self, groups: FoldedGroups) -> None:
        pass

    def close(self) -> Exception | None:
        """Let go of it, while there still are communicators; returns an error that nobody has asked for."""
        return None


class FoldedGroups:
    """The communicators of one layout on one rank: one :class:`AxisGroup` per axis and compound.

    Made by :func:`create_groups`. It holds the only process groups of the library, is passed as an argument, and
    several of them (for several layouts) coexist in one process. Usable as a context manager; :meth:`destroy`
    leaves nothing behind.

    Attributes:
        layout, rank, coordinate: the layout, this global rank, and where it sits in both views.
        pp: ranks with the same place in every pipeline stage.
        dp, cp, tp: data, context and tensor parallelism of the dense layers; a position in ``tp`` is a *lane*.
        edp, ep, etp: data parallelism of the experts, expert parallelism, tensor parallelism inside an expert.
        dp_cp: all ranks of one lane, over which dense gradients are averaged.
        ep_etp: the ranks that together hold every routed expert once.
    """

    __slots__ = (*AXES, "_communicators", "_data_axes", "_destroyed", "_factory", "_kept", "_meshes", "_owns_default")
    __slots__ += ("__weakref__", "coordinate", "layout", "rank")

    layout: FoldedLayout
    rank: int
    coordinate: Coordinate
    pp: AxisGroup
    dp: AxisGroup
    cp: AxisGroup
    tp: AxisGroup
    edp: AxisGroup
    ep: AxisGroup
    etp: AxisGroup
    dp_cp: AxisGroup
    ep_etp: AxisGroup

    def __init__(
        self,
        layout: FoldedLayout,
        rank: int,
        factory: GroupFactory | None,
        separate: frozenset[str] = frozenset(),
        owns_default: bool = False,
        given: Mapping[str, ProcessGroup] | None = None,
    ) -> None:
        self.layout = layout
        self.rank = rank
        self.coordinate = layout.coordinate(rank)
        self._factory = factory
        self._owns_default = owns_default
        self._destroyed = False
        self._meshes: dict[str, DeviceMesh] = {}
        self._data_axes: dict[tuple[str, int], tuple[AxisGroup, AxisGroup]] = {}
        self._kept: dict[type[Kept], Kept] = {}
        # An axis has the same size on every rank, and whether two axes have equal rank sets does not depend on the
        # rank either (a tested law of layouts), so all ranks make the same groups in the same order.
        self._communicators: dict[tuple[str, tuple[int, ...]], ProcessGroup] = {}
        try:
            for axis in AXES:
                ranks = layout.group(axis, rank)
                if given is None:
                    process_group = self._communicator(axis, ranks, axis in separate) if len(ranks) > 1 else None
                elif len(ranks) == 1 or axis in given:
                    process_group = given[axis] if len(ranks) > 1 else None
                else:
                    continue  # asking for it raises
                setattr(self, axis, AxisGroup(axis, ranks, ranks.index(rank), process_group))
        except BaseException:
            for made in self.communicators:
                dist.destroy_process_group(made)
            raise

    @classmethod
    def over(cls, *, tp: ProcessGroup, ep: ProcessGroup) -> Self:
        """Groups over process groups that somebody else made, and will destroy; none is made here.

        Their layout is that of the ranks of the world in ``"consecutive"`` order with ``etp = 1``. There are the axes
        ``tp``, ``ep`` and ``ep_etp``, and those of one rank. Asking for another, or for a mesh, raises a
        ``GroupsError``.

        Raises:
            LayoutError: their sizes make no layout of the world. GroupsError: one is not the group of its axis there,
                or lists its ranks in another order.
        """
        layout = solve_layout(dist.get_world_size(), tp=tp.size(), ep=ep.size(), order="consecutive")
        return cls(layout, dist.get_rank(), None, given={"tp": tp, "ep": ep, "ep_etp": ep})

    def _communicator(self, axis: str, ranks: tuple[int, ...], separate: bool) -> ProcessGroup:
        """The process group of these ranks: shared by axes with equal ranks, unless the axis wants its own."""
        assert self._factory is not None  # only a world of one rank has no factory, and it has singleton axes only
        key = (axis if separate else "", ranks)  # equal rank sets are listed in equal order, a tested law of layouts
        if key not in self._communicators:
            self._communicators[key] = self._factory.create(key[1], axis if separate else "")
        return self._communicators[key]

    def __getattr__(self, name: str) -> NoReturn:
        if name in AXES and not self._destroyed:
            raise GroupsError(
                f"There is no process group for {name} here: these groups are over process groups that somebody else "
                f"made, for other axes."
            )
        if name in AXES:
            raise GroupsError("These groups were destroyed; make new ones with foldpar.create_groups(layout).")
        raise AttributeError(f"FoldedGroups has no attribute {name!r}. Axes are {', '.join(AXES)}.")

    def axis(self, name: str) -> AxisGroup:
        """The group of an axis or compound by name, such as ``"ep"`` or ``"dp_cp"``.

        Raises:
            LayoutError: no such axis. GroupsError: the groups were destroyed.
        """
        if name not in AXES:
            raise LayoutError(f"There is no axis {name!r}. Axes are {', '.join(AXES)}.")
        group: AxisGroup = getattr(self, name)
        return group

    @property
    def communicators(self) -> tuple[ProcessGroup, ...]:
        """The process groups that this object made, each once, in the order of creation."""
        return tuple(self._communicators.values())

    @property
    def device(self) -> torch.device:
        """Where its communicators want their tensors; the CPU without torch.distributed."""
        cuda = self._factory is not None and self._factory.device_type == "cuda"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    def mesh(self, view: Literal["dense", "expert"]) -> DeviceMesh:
        """A ``DeviceMesh`` over the same communicators, for the parts of torch that want one.

        Dimensions are named ``(pp, dp, cp, tp)`` or ``(pp, edp, ep, etp)``, singletons included, so that
        ``groups.mesh("dense")["tp"]`` works for every ``tp``. Call it on every rank. The mesh of a view is made once.

        It exists in every layout: a rank's place on the mesh is its coordinate, also where groups do not ascend.

        Raises:
            LayoutError: another view. GroupsError: without torch.distributed.
        """
        if view not in _VIEW_AXES:
            raise LayoutError(f"There is no view {view!r}. Views are 'dense' and 'expert'.")
        if view not in self._meshes:
            self._meshes[view] = self._mesh_over(view, {axis: self.axis(axis) for axis in _VIEW_AXES[view]})
        return self._meshes[view]

    @property
    def mesh_of_shares(self) -> DeviceMesh:
        """The dimensions ``("ep", "etp")`` of ``mesh("expert")``, over which experts are shared out; made once."""
        if "ep_etp" not in self._meshes:
            self._meshes["ep_etp"] = self.mesh("expert")["ep", "etp"]
        return self._meshes["ep_etp"]

    def data_axes(self, axis: Literal["dp_cp", "edp"], replicas: int = 1) -> tuple[AxisGroup, AxisGroup]:
        """A data axis as so many replicas of shards: the ranks of equal shards, and those of one replica's shards.

        Of ranks ``0 1 2 3`` on the axis and two replicas, rank 2 has the groups ``(0, 2)`` and ``(2, 3)``. With one
        replica the second is the axis itself. Made once; call it on every rank.
        """
        whole, key = self.axis(axis), (axis, replicas)
        if key not in self._data_axes:
            size = whole.size // replicas
            place = whole.index % size
            start = whole.index - place
            parts = (whole.ranks[place::size], whole.ranks[start : start + size])
            names = (f"{axis}_replicas", f"{axis}_shards")
            of_replicas, of_shards = (
                whole if ranks == whole.ranks else self._part(axis, name, ranks)
                for name, ranks in zip(names, parts, strict=True)
            )
            self._data_axes[key] = of_replicas, of_shards
        return self._data_axes[key]

    def _part(self, axis: str, name: str, ranks: tuple[int, ...]) -> AxisGroup:
        """A part of an axis, over a communicator of its own: gathers must not queue behind an all-to-all."""
        process_group = self._communicator(name, ranks, separate=True) if len(ranks) > 1 else None
        return AxisGroup(axis, ranks, ranks.index(self.rank), process_group)

    def data_mesh(self, axis: Literal["dp_cp", "edp"], replicas: int = 1) -> DeviceMesh:
        """The mesh of a data axis, over which FSDP2 shards: one dimension, named like the axis.

        With several replicas there are two, ``(axis + "_replicas", axis)``: the parameter is the same on the first and
        cut over the second, see :meth:`data_axes`.

        A rank's place on it is its coordinate. It is a part of ``mesh("expert")`` for ``edp``, and for ``dp_cp`` of a
        mesh ``(pp, dp_cp, tp)`` of the world, so that FSDP2 can put it beside the axes that shard parameters already.
        It is made once. Call it on every rank.

        Raises:
            LayoutError: another axis. GroupsError: without torch.distributed.
        """
        if axis not in ("dp_cp", "edp"):
            raise LayoutError(f"The data axes are 'dp_cp' and 'edp', not {axis!r}.")
        key = axis if replicas == 1 else f"{axis} x {replicas}"
        if key not in self._meshes:
            self._meshes[key] = self._make_data_mesh(axis, replicas)
        return self._meshes[key]

    def _make_data_mesh(self, axis: Literal["dp_cp", "edp"], replicas: int) -> DeviceMesh:
        if axis == "edp" and replicas == 1:
            return self.mesh("expert")[axis]
        # FSDP2 puts this mesh beside that of the axes which shard already, so both count the ranks of the whole world.
        view: Literal["dense", "expert"] = "expert" if axis == "edp" else "dense"
        of_replicas, of_shards = self.data_axes(axis, replicas)
        data: dict[str, AxisGroup] = {} if replicas == 1 else {f"{axis}_replicas": of_replicas}
        data[axis] = of_shards
        rest = (self.ep, self.etp) if axis == "edp" else (self.tp,)
        whole = self._mesh_over(view, {"pp": self.pp, **data, **{group.axis: group for group in rest}})
        return whole[tuple(data)] if replicas > 1 else whole[axis]

    def _alone(self) -> ProcessGroup:
        return self._communicator("", (self.rank,), separate=False)

    def _ranks_of_mesh(self, view: str) -> torch.Tensor:
        """All ranks in the order of their positions in a view."""
        world = self.layout.world
        if view == "dense":
            return torch.arange(world)
        return torch.tensor([self.layout.rank_at("expert", position) for position in range(world)])

    def _mesh_over(self, view: Literal["dense", "expert"], dims: Mapping[str, AxisGroup]) -> DeviceMesh:
        """A mesh of the world with these dimensions by name, which partition a view."""
        if self._factory is None:
            raise GroupsError("A DeviceMesh needs torch.distributed: call init_process_group before create_groups.")
        forget_meshes()
        return DeviceMesh.from_group(
            # All axes of one rank share a group: a mesh needs one for every dimension.
            [group.process_group or self._alone() for group in dims.values()],
            self._factory.device_type,
            mesh=self._ranks_of_mesh(view).reshape([group.size for group in dims.values()]),
            mesh_dim_names=tuple(dims),
        )

    def keep(self, kind: type[OneKept]) -> OneKept:
        """The one :class:`Kept` of a class that these groups have; made on first use."""
        if kind not in self._kept:
            self._kept[kind] = kind(self)
        return cast(OneKept, self._kept[kind])

    def twin(self, layout: FoldedLayout | None = None) -> FoldedGroups:
        """New groups, of this layout or another, with the backend and timeout of these; call it on every rank.

        Their communicators are their own, so traffic on them neither queues behind that on these nor has to come in
        the same order relative to it on all ranks. Destroy them when done.
        """
        factory = self._factory
        if factory is None:
            return create_groups(layout or self.layout)
        return create_groups(layout or self.layout, backend=factory.backend, timeout=factory.timeout)

    def destroy(self) -> None:
        """Destroy every communicator that this object made; call it on every rank. Repeating it does nothing.

        A checkpoint that is being saved in the background is waited for.

        Raises:
            CheckpointError: that save failed and nobody has asked; everything is destroyed then too.
        """
        if self._destroyed:
            return
        failed = [kept.close() for kept in self._kept.values()]
        self._destroyed = True
        meshes = [*self._meshes.values()]
        self._meshes.clear()
        self._kept.clear()
        self._data_axes.clear()
        for axis in AXES:
            with suppress(AttributeError):  # of groups over a part of the axes
                delattr(self, axis)
        for process_group in self.communicators:
            dist.destroy_process_group(process_group)
        self._communicators.clear()
        if meshes:
            forget_meshes(meshes)
        if self._owns_default:
            dist.destroy_process_group()
        for error in failed:
            if error is not None:
                raise error

    def __deepcopy__(self, memo: object) -> Self:
        return self  # a copied module talks over the same communicators

    def __copy__(self) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise GroupsError(_NOT_PICKLED.format("FoldedGroups"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.destroy()
        except FoldingError as failed:
            if error is None:
                raise
            warnings.warn(str(failed), RuntimeWarning, stacklevel=2)  # what ended the block is the error to see

    def __repr__(self) -> str:
        state = "destroyed" if self._destroyed else f"{len(self._communicators)} communicator(s)"
        return f"FoldedGroups(rank {self.rank} of {self.layout!r}, {state})"


_NOT_PICKLED = (
    "{} cannot be pickled: live communicators mean nothing in another process or at another time. Pickle the layout "
    "(groups.layout) and make groups from it there; of a model that holds groups, save the state_dict."
)


def create_groups(
    layout: FoldedLayout,
    *,
    backend: str | None = None,
    timeout: timedelta | None = None,
    separate: Iterable[str] = (),
) -> FoldedGroups:
    """Make the process groups of a layout; call it once on every rank with the same arguments.

    Works with a default process group that the caller initialised, or straight under ``torchrun``, where it
    initialises one (and :meth:`FoldedGroups.destroy` then removes it). A layout of one rank needs neither, but then
    has no meshes.

    Axes with the same ranks share one communicator; an axis named in ``separate`` gets its own, so that, for
    example, gradient traffic over ``"edp"`` need not queue behind the all-to-all. A rank makes only the groups that
    it is a member of. ``backend=None`` and ``timeout=None`` inherit those of the default process group.

    Example, under ``torchrun --nproc-per-node 4``::

        with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
            groups.ep.ranks   # (0, 2, 1, 3) on every rank

    A rank that fails here, in its arguments or in making a group, raises its own error, and the others one that quotes
    it: at once, or where they wait in the backend for that very rank, after its timeout.

    Raises:
        GroupsError: on every rank: the layout's world is not the process group's, ranks passed different arguments, or
            one of them failed; several processes use one GPU. Before any communication: there is nothing to initialise
            from.
        LayoutError: an unknown axis in ``separate``.
    """
    refusal = _refusal(layout, backend, timeout, separate)
    if refusal is not None and not dist.is_initialized():
        raise refusal
    under_torchrun = os.environ.get("WORLD_SIZE") == "1" and "RANK" in os.environ
    owns_default = not dist.is_initialized() and (layout.world > 1 or under_torchrun)
    if owns_default:
        _initialise_from_environment(layout, backend, timeout)
    if not dist.is_initialized():
        return FoldedGroups(layout, 0, None)
    try:
        chosen = frozenset() if refusal is not None else frozenset(_names(separate))
        generation, nonce = _agree(layout, backend, chosen, refusal)
        factory = GroupFactory.of_default_group(backend, timeout, generation, nonce)
        return _make_together(
            lambda: FoldedGroups(layout, dist.get_rank(), factory, chosen, owns_default), _destroy_all, factory.nonce
        )
    except BaseException:
        if owns_default:
            dist.destroy_process_group()
        raise


def _names(separate: Iterable[str]) -> tuple[str, ...]:
    return (separate,) if isinstance(separate, str) else tuple(separate)


def _refusal(layout: object, backend: object, timeout: object, separate: object) -> FoldingError | None:
    """What is wrong with the arguments of this rank, to be raised when the others know of it."""
    try:
        expect(
            "create_groups",
            layout=(layout, FoldedLayout),
            backend=(backend, (str, type(None))),
            timeout=(timeout, (timedelta, type(None))),
            separate=(separate, Iterable),
        )
        assert isinstance(layout, FoldedLayout) and isinstance(separate, Iterable)
        _check_backend(cast("str | None", backend))
        for name in _names(separate):
            if name not in AXES:
                known = ", ".join(AXES)
                raise LayoutError(f"separate names the axis {name!r}, which does not exist. Axes are {known}.")
        if dist.is_initialized() and dist.get_world_size() != layout.world:
            raise GroupsError(
                f"The layout is for world = {layout.world}, but the default process group has {dist.get_world_size()} "
                f"rank(s). Solve the layout with world = torch.distributed.get_world_size()."
            )
    except FoldingError as error:
        return error
    return None


def _check_backend(backend: str | None) -> None:
    """Raise for a name that torch does not know, also where no group is made: ``"cpu:gloo,cuda:nccl"`` names two."""
    for name in [] if backend is None else [part.rpartition(":")[2] for part in backend.split(",")]:
        if name.lower() not in dist.Backend.backend_list:
            known = ", ".join(map(repr, dist.Backend.backend_list))
            raise GroupsError(f"backend is {backend!r}, and torch.distributed knows no {name!r}. It knows {known}.")


def _initialise_from_environment(layout: FoldedLayout, backend: str | None, timeout: timedelta | None) -> None:
    world = os.environ.get("WORLD_SIZE")
    if world is None or "RANK" not in os.environ:
        raise GroupsError(
            f"A layout of world = {layout.world} needs that many processes: start them with "
            f"'torchrun --nproc-per-node {layout.world} script.py', or call torch.distributed.init_process_group first."
        )
    if int(world) != layout.world:
        raise GroupsError(
            f"The layout is for world = {layout.world}, but torchrun started WORLD_SIZE = {world} process(es). "
            f"Solve the layout with world = {world}, or start {layout.world} processes."
        )
    start_from_environment(backend, timeout)


def _agree(
    layout: FoldedLayout, backend: str | None, separate: frozenset[str], refusal: FoldingError | None
) -> tuple[int, int]:
    """Compare what the ranks passed, and agree on how to name this call's groups: one all-reduce of a few integers.

    Returns a generation (one more than any that lives on any rank) and a number that no earlier call had.
    """
    facts = {} if refusal is not None else _facts(layout, backend, separate)
    mine = [facts.get(name, 0) for name in _FACTS]
    opposite = [-value for value in mine]
    own = [*mine, *opposite, next_generation(), secrets.randbits(62), int(refusal is not None)]
    *extremes, generation, nonce, refused = _largest(own, None)
    if refused:
        _raise_first(nonce, refusal)
    largest, smallest = extremes[: len(mine)], [-value for value in extremes[len(mine) :]]
    differing = [name for name, low, high in zip(_FACTS, smallest, largest, strict=True) if low != high]
    if differing:
        raise GroupsError(
            f"Ranks called create_groups with different arguments: {', '.join(differing)} differ(s). "
            f"Rank {dist.get_rank()} passed {layout!r}, backend={backend!r}, separate={sorted(separate)}. "
            f"Every rank must pass the same."
        )
    return generation, nonce


_FACTS = ("tp", "ep", "etp", "pp", "cp", "order", "separate", "backend")


def _facts(layout: FoldedLayout, backend: str | None, separate: frozenset[str]) -> dict[str, int]:
    return {
        "tp": layout.tp,
        "ep": layout.ep,
        "etp": layout.etp,
        "pp": layout.pp,
        "cp": layout.cp,
        "order": int(layout.order == "consecutive"),
        "separate": sum(1 << place for place, axis in enumerate(AXES) if axis in separate),
        "backend": zlib.crc32((backend or "").encode()),
    }


def separate_world(groups: FoldedGroups, backend: str) -> ProcessGroup | None:
    """A process group of all ranks, on its own; ``None`` for a single rank, which needs none.

    Call it on every rank. The caller destroys it.

    Raises:
        GroupsError: see :func:`create_groups`.
    """
    world = groups.layout.world
    if world == 1:
        return None
    generation, nonce = _agree(groups.layout, backend, frozenset(), None)
    factory = GroupFactory.of_default_group(backend, None, generation, nonce)
    return _make_together(lambda: factory.create(tuple(range(world))), dist.destroy_process_group, nonce)


def _destroy_all(groups: FoldedGroups) -> None:
    groups._owns_default = False  # create_groups does that
    groups.destroy()


def _make_together(make: Callable[[], Made], unmake: Callable[[Made], None], nonce: int) -> Made:
    """Make groups on every rank, or on none: those of backends that connect later would wait for a missing rank."""
    made, failure = None, None
    try:
        made = make()
    except Exception as error:
        failure = error
        _first_cause(nonce, error)
    try:
        (failed,) = _largest([int(failure is not None)], nonce)
        if failed:
            _raise_first(nonce, failure)
    except BaseException:
        if made is not None:
            unmake(made)
        raise
    assert made is not None
    return made


def _largest(values: list[int], nonce: int | None) -> list[int]:
    """The largest of all ranks' values, place by place; a first cause is known under the nonce, if there is one."""
    try:
        sent = torch.tensor(values, device=_collective_device())
        dist.all_reduce(sent, op=dist.ReduceOp.MAX)
        return cast("list[int]", sent.tolist())
    except RuntimeError as error:
        if nonce is not None and default_store().check([_cause_key(nonce)]):
            _raise_first(nonce, None)
        raise GroupsError(
            f"create_groups: rank {dist.get_rank()} lost touch with the others, of which one has raised or ended "
            f"before it came here, or did not come in time; look at the first error of every rank. The backend said: "
            f"{error}{shared_gpu_hint(error)}"
        ) from error


def _raise_first(nonce: int, own: Exception | None) -> NoReturn:
    """Raise this rank's own error, or one that quotes the first of any rank."""
    cause = _first_cause(nonce, own)
    if isinstance(own, FoldingError):
        raise own
    raise GroupsError(f"create_groups: {cause}{shared_gpu_hint(cause)}") from own


def _first_cause(nonce: int, own: Exception | None) -> str:
    """What the first rank that failed said in the default group's store; this rank's error, if it is the first."""
    if own is None:
        return default_store().get(_cause_key(nonce)).decode()
    said = str(own).removeprefix("create_groups: ") if isinstance(own, FoldingError) else f"{type(own).__name__}: {own}"
    return default_store().compare_set(_cause_key(nonce), "", f"rank {dist.get_rank()} failed: {said}").decode()


def _cause_key(nonce: int) -> str:
    return f"foldpar-{nonce:x}-failed"


def shared_gpu_hint(error: object) -> str:
    """What to do about NCCL's word for several processes on one GPU; empty for other errors."""
    if "duplicate gpu" not in str(error).lower():
        return ""
    here = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "the same"
    return (
        f"\nSeveral processes use one GPU, and NCCL takes one process for each (this one, LOCAL_RANK="
        f"{os.environ.get('LOCAL_RANK', 'unset')}, is on {here}). Before init_process_group and create_groups, say "
        f'torch.cuda.set_device(int(os.environ["LOCAL_RANK"])), and start no more processes on a node than it has GPUs.'
    )


def _collective_device() -> torch.device:
    """Where the default process group wants its tensors."""
    if "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
