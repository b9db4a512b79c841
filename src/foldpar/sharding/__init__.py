"""Parameters, gradients and optimizer states shared out over the data ranks, by FSDP2.

    shard       shard_model: stages 1, 2 and 3 for dense layers over DP x CP and for experts over EDP
    conversion  experts that no other rank holds, computed with in another dtype
    memory      what each rank then holds, in bytes, before anything is made

Laws: gradients and norms stay those of a single process in every stage.
"""

from __future__ import annotations

from foldpar.sharding.memory import LocalParameter, RankMemory, planned_parameters, predict_memory
from foldpar.sharding.shard import accumulate, shard_model

__all__ = [
    "LocalParameter",
    "RankMemory",
    "accumulate",
    "planned_parameters",
    "predict_memory",
    "shard_model",
]
