"""foldpar inside transformers, for models that are not folded: its grouped products, and its journey of rows."""

from __future__ import annotations

import math
from importlib import import_module
from importlib.metadata import version
from typing import Any

from foldpar.arguments import expect
from foldpar.errors import ArgumentError, ModelError
from foldpar.hf.kernels import experts_forward
from foldpar.moe import OneSided, Sharing, as_expected

__all__ = ["register_with_transformers"]


def register_with_transformers(name: str = "foldpar", *, one_sided: Sharing = None) -> str:
    """Make foldpar known to transformers under a name, in two places; returns the name.

    **Its products**, an experts implementation: the model keeps its modules and its weights, and each rank computes all
    experts that it holds, on one GPU, under plain data parallelism and under FSDP::

        model.set_experts_implementation(foldpar.hf.register_with_transformers())

    **Its journey of rows**, an expert-parallel implementation, with transformers 5.23 and later: the model is loaded
    and spread by transformers, over the meshes and process groups that it makes; foldpar brings rows to their experts,
    each once per rank, computes them and brings the sums back. ``Trainer``, FSDP2 over ``efsdp``, ``save_pretrained``,
    gradient checkpointing and ``generate`` stay as they are::

        name = foldpar.hf.register_with_transformers()
        distributed = DistributedConfig(tp_size=2, fsdp_size=4, ep_size=4, ep_implementation=name)
        model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", distributed_config=distributed)

    There, experts that the products do not compute, or for which another implementation than the default was chosen
    (``"grouped_mm"``), are computed by transformers. Layouts that transformers has not (``ep`` no multiple of ``tp``,
    ``etp``, sequence parallelism) are :func:`foldpar.fold_model`'s, whose experts come by neither way.

    Args:
        one_sided: how rows travel through memory that GPUs share: where that is possible by default, ``False`` for
            messages. Experts that transformers computes get messages, unless this says ``OneSided()``. Nobody reads
            there whether rows found room, so there must be room for all: no ``slack``, or ``slack=math.inf``.

    Backward:
        Exact, of all parameters, inputs and routing weights; also in float64. Over the lanes of a TP group it is that
        of transformers' ``"all_to_all"``: gradients are equal on all lanes.

    Raises:
        ArgumentError: ``one_sided`` with less room than for all rows. ModelError: ``one_sided`` with a transformers
            that has no expert-parallel implementations; in forward, as experts implementation, experts with a norm
            behind them, or an activation that cannot be kept as a function.

    Source: transformers' ``integrations/moe.py`` and ``distributed/expert_parallel.py``.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    expect("register_with_transformers", name=(name, str), one_sided=(as_expected(one_sided), (OneSided, type(None))))
    if isinstance(one_sided, OneSided) and one_sided.slack not in (None, math.inf):
        raise ArgumentError(
            f"register_with_transformers: one_sided has slack = {one_sided.slack}, room for a part of all rows that "
            f"may come, and in a loop of transformers nobody reads whether they found it. Leave slack away: there is "
            f"room for all then."
        )
    if (module := _expert_parallel_of_transformers()) is not None:
        from foldpar.hf.expert_parallel import implementation

        module.EPImplementationInterface.register(name, implementation(name, one_sided))
    elif isinstance(one_sided, OneSided):
        raise ModelError(
            f"register_with_transformers: one_sided is for expert-parallel implementations, which transformers has "
            f"since 5.23, and this is {version('transformers')}. Without it, foldpar's products are registered alone."
        )
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    return name


def _expert_parallel_of_transformers() -> Any:
    """The module with the registry of expert-parallel implementations; ``None`` where there is none."""
    try:
        module = import_module("transformers.distributed.expert_parallel")
    except ImportError:
        return None
    return module if hasattr(module, "EPImplementationInterface") else None
