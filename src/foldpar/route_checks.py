"""Opt-in check that lanes which route the same tokens decide alike."""

from __future__ import annotations

import torch

from foldpar.checks import assert_same_on_group
from foldpar.collectives import all_reduce_
from foldpar.errors import ReplicaError
from foldpar.groups import FoldedGroups
from foldpar.routing import Routing


def check_same_routing(routing: Routing, groups: FoldedGroups) -> None:
    """Raise on every rank of the stage if the lanes of any TP group decided differently about the same tokens.

    Raises:
        ReplicaError: names the rank, the field and the first entries that differ, and what usually makes them differ.
    """
    fields = {"ids": routing.ids, "weights": routing.weights.detach()}
    if routing.mask is not None:
        fields["mask"] = routing.mask
    found = "The routing differs between the lanes of another TP group of the stage; see its ranks."
    differs = torch.zeros((), device=routing.ids.device)
    try:
        assert_same_on_group(fields, groups.tp, what="The routing of tokens that all lanes hold")
    except ReplicaError as error:
        found = (
            f"{error}\npartition='assignments' needs the same bits on all lanes, or assignments are lost and counted "
            f"twice. Lanes differ if their routers do (check_replicas), if their inputs do, or if a router draws "
            f"random numbers after lanes were seeded differently."
        )
        differs += 1
    if all_reduce_(all_reduce_(differs, groups.tp, "max"), groups.dp_cp, "max").item():
        raise ReplicaError(found)
