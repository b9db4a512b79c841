"""Whether what several ranks hold is equal: a digest of each copy, compared on the first rank.

every rank: (which tensor and part, digest of its bits) x entries -> rank 0 sorts them, neighbours must agree
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from foldpar.checkpoint.state import Entry
from foldpar.comm import Ranks, digest_of_bits
from foldpar.errors import CheckpointError
from foldpar.wording import below, some_ranks

__all__ = ["check_copies"]


@torch.no_grad()
def check_copies(ranks: Ranks, entries: Sequence[Entry], stage: int) -> None:
    """Compare all copies of every part of a tensor, bit by bit as far as a digest of 64 bits can tell.

    Args:
        stage: the pipeline stage of this rank.

    Raises:
        CheckpointError: on every rank: copies differ; names the tensors and the ranks.
    """
    held = [(_number(f"{stage} {entry.key} {entry.share}"), entry) for entry in entries if _has_copies(entry)]
    ids = torch.tensor([number for number, _ in held], dtype=torch.int64)
    gathered = ranks.gather((ids, _on_host([digest_of_bits(entry.tensor) for _, entry in held])))
    differing = ranks.broadcast(_differing(gathered) if ranks.rank == 0 else {})
    if not differing:
        return
    own = {number: entry.key for number, entry in held if number in differing}
    names = {number: key for of_rank in ranks.all_gather(own) for number, key in of_rank.items()}
    lines = sorted(f"{names[number]}: {text}" for number, text in differing.items())
    raise CheckpointError(
        f"{ranks.doing}: copies of one tensor differ between ranks, and a checkpoint holds one of each:"
        f"{below(lines)}\n"
        f"Nothing was saved. Replicas start equal and take equal steps: check_replicas(model, groups) says over which "
        f"axis parameters drifted. A state that is one number of each rank's own share cannot be placed in another "
        f"layout: save with optimizer=None. A buffer that is each rank's own is registered with persistent=False, or "
        f"averaged first. check_replicas=False saves the copies as they are, each piece from one of them."
    )


def _on_host(digests: Sequence[Tensor]) -> Tensor:
    """Scalars of several devices (a step counter lies on the CPU) as one vector, with one transfer from each."""
    collected = torch.empty(len(digests), dtype=torch.int64)
    for device in {each.device for each in digests}:
        places = [place for place, each in enumerate(digests) if each.device == device]
        collected[places] = torch.stack([digests[place] for place in places]).cpu()
    return collected


def _has_copies(entry: Entry) -> bool:
    return bool(entry.share.boxes) and (entry.replicas > 1 or entry.share.is_whole)


def _differing(gathered: Sequence[tuple[Tensor, Tensor]]) -> dict[int, str]:
    """What some ranks hold otherwise than others -> which ranks."""
    ids = torch.cat([of_rank for of_rank, _ in gathered])
    digests = torch.cat([of_rank for _, of_rank in gathered])
    of_rank = torch.cat([torch.full_like(found, rank) for rank, (found, _) in enumerate(gathered)])
    order = ids.argsort(stable=True)
    ids, digests, of_rank = ids[order], digests[order], of_rank[order]
    # Where a neighbour of the same id has another digest; the ranks of an id are in order, so the first one leads.
    wrong = ((ids[1:] == ids[:-1]) & (digests[1:] != digests[:-1])).nonzero().flatten() + 1
    found = {}
    for place in wrong.tolist():
        number = int(ids[place])
        if number not in found:
            same = (ids == number).nonzero().flatten()
            first = same[0]
            others = of_rank[same[digests[same] != digests[first]]].tolist()
            found[number] = f"rank{'s' if len(others) > 1 else ''} {some_ranks(others)} and rank {int(of_rank[first])}"
    return found


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
