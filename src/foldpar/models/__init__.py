"""Whole models: what can be folded, shown before it is done, and done.

    plan             plan_fold: one row for each block, nothing changed
    fold             fold_model: the plan carried out
    dense_plan       how dense layers are cut over the lanes; ``tensor_parallel`` cuts them
    recognition      what a block's code is; ``block_proof`` runs it beside its folded self
    meta_copy        a copy without memory, to look at
    refusals         what a folded model does not take afterwards
    known/           blocks of transformers' families, and how to teach another one (MoEAdapter)

Laws: the folded model computes what the given one did, in value and gradient, or ``plan_fold`` says why not; nothing of
a block is lost.
"""

from __future__ import annotations

from foldpar.models.fold import fold_model
from foldpar.models.known import ExpertWeights, MoEAdapter
from foldpar.models.plan import FoldPlan, FoldPlanRow, plan_fold
from foldpar.models.recognition import activation_of, experts_implementation, own_gate

__all__ = [
    "ExpertWeights",
    "FoldPlan",
    "FoldPlanRow",
    "MoEAdapter",
    "activation_of",
    "experts_implementation",
    "fold_model",
    "own_gate",
    "plan_fold",
]
