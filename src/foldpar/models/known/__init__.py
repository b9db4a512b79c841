"""What is known about the MoE blocks of model families: one small file for each family or group of them.

:func:`foldpar.fold_model` looks in ``DEFAULT_ADAPTERS`` after the adapters that it was given. They name classes, and
load no model code.
"""

from foldpar.models.known import deepseek, gpt_oss, llama4, mixtral, nemotron_h, refused
from foldpar.models.known.adapter import ExpertWeights, MoEAdapter
from foldpar.models.known.interface import ByInterface, adapter_by_interface

__all__ = ["DEFAULT_ADAPTERS", "ByInterface", "ExpertWeights", "MoEAdapter", "adapter_by_interface"]

DEFAULT_ADAPTERS: tuple[MoEAdapter, ...] = (
    *mixtral.ADAPTERS,
    *deepseek.ADAPTERS,
    *gpt_oss.ADAPTERS,
    *llama4.ADAPTERS,
    *nemotron_h.ADAPTERS,
    *refused.ADAPTERS,
)
