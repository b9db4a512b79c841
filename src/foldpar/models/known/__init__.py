"""What is known about the MoE blocks of model families: one small file for each family or group of them.

:func:`foldpar.fold_model` looks in ``DEFAULT_ADAPTERS`` after the adapters that it was given. They name classes, and
load no model code.
"""

from foldpar.models.known import deepseek, gpt_oss, llama4, mixtral, refused
from foldpar.models.known.adapter import ExpertWeights, MoEAdapter

__all__ = ["DEFAULT_ADAPTERS", "ExpertWeights", "MoEAdapter"]

DEFAULT_ADAPTERS: tuple[MoEAdapter, ...] = (
    *mixtral.ADAPTERS,
    *deepseek.ADAPTERS,
    *gpt_oss.ADAPTERS,
    *llama4.ADAPTERS,
    *refused.ADAPTERS,
)
