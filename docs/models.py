"""Write ``models.md``: what folding makes of every MoE model type of the installed transformers.

    python docs/models.py

Each type is built from its default configuration with few layers, on the meta device, planned and proven block by
block, as ``fold_model`` does it. Which types are compared with one process, tensor parallelism included, the tests say.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

import foldpar
from foldpar.models.block_proof import prove_block
from foldpar.models.plan import Block, survey

HERE = Path(__file__).parent
PAGE = HERE / "models.md"
LAYERS, EXPERTS = 8, 16
ONE = foldpar.solve_layout(1)
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 128,
    "indexer_budget": 512,
    "indexer_compress_ratio": 4,
}
LACKING: dict[str, dict[str, dict[str, Any]]] = {
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * (LAYERS - 1)]}},
    "diffusion_gemma": {"text_config": {"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": {"": INDEXER},
}
"""What a default configuration leaves out, so that it makes no model; by part."""
HEAD = """# Models of transformers

Every model type of transformers {version} whose code has experts, as `fold_model` takes it. *Compared*: trained
folded and in one process, with `tp`, `ep` and `etp`, all gradients equal
([tests/models/test_fold_parity.py](../tests/models/test_fold_parity.py)). *Proven*: each block is equal to its folded
self, which `fold_model` finds out anew each time, and here on four ranks too
([tests/models/test_every_model_type.py](../tests/models/test_every_model_type.py)); it folds over `ep` and `etp` with
`tp = 1`, and over `tp` with an adapter of one line, which is then yours to compare. *Unproven*: the plan works, and a
block could not be run beside its folded self. *Refused*: before anything is touched. [Why](#why-not) is below the
table. Written by `docs/models.py`.

| `model_type` | folding | block |
|---|---|---|
"""
REASONS = """
## Why not

"""


def compared() -> dict[str, Any]:
    """Families that the tests compare with one process, tiny ones, by the class of their configuration."""
    sys.path.insert(0, str(HERE.parent / "tests" / "support"))
    from hf_models import FAMILIES

    return {family.config: family for name, family in FAMILIES.items() if name != "jetmoe"}


def types_with_experts() -> Iterator[str]:
    """Model types whose modeling file speaks of experts."""
    folder = Path(transformers.__file__).parent / "models"
    for model_type in CONFIG_MAPPING_NAMES:
        module = model_type_to_module_name(model_type)
        text = "".join(path.read_text() for path in (folder / module).glob("modeling_*.py"))
        if re.search(r"class \w*(Experts|SparseMoe|SparseMLP|MoE)\w*\(nn\.Module(Dict|List)?\)", text):
            yield model_type


def small(model_type: str) -> PreTrainedConfig:
    """The default configuration with few layers, in the parts of it that have layers."""
    given: dict[str, Any] = {"num_hidden_layers": LAYERS}
    whole = AutoConfig.for_model(model_type)
    for name in whole.sub_configs:
        part = getattr(whole, name, None)
        if part is not None and hasattr(part, "num_hidden_layers"):
            given[name] = {"num_hidden_layers": min(LAYERS, part.num_hidden_layers)}
    with suppress(Exception):  # of a configuration whose lists are as long as its layers
        whole = AutoConfig.for_model(model_type, **given)
    for part in (whole, *(getattr(whole, name, None) for name in whole.sub_configs)):
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
            with suppress(AttributeError, ValueError, RuntimeError):  # numbers that differ between layers stay
                if isinstance(getattr(part, name, None), int) and getattr(part, name) > EXPERTS:
                    setattr(part, name, EXPERTS)
    for place, values in LACKING.get(model_type, {}).items():
        for name, value in values.items():
            setattr(getattr(whole, place) if place else whole, name, value)
    return whole


def row(model_type: str, known: dict[str, Any]) -> tuple[str, ...] | None:
    """The cells of a type, and why it is not folded; ``None`` where its model has no experts at all."""
    try:
        config = small(model_type)
        family = known.get(type(config).__name__)
        with torch.device("meta"):
            model = AutoModel.from_config(config) if family is None else family.make()
    except Exception as error:
        if "Unrecognized configuration class" in str(error):  # of a part that is no model by itself
            return None
        return (f"`{model_type}`", "", "not looked at", f"its default configuration makes no model: {brief(error)}")
    if not any(
        "expert" in type(module).__name__.lower() or "moe" in type(module).__name__.lower()
        for module in model.modules()
    ):
        return None
    try:
        found = survey(model, ONE, ())
    except foldpar.FoldingError as error:
        if "has no MoE block to fold" in str(error):
            experts = sorted({name for each in model.modules() if "Experts" in (name := type(each).__name__)})
            why = f"{', '.join(experts)}: no stacked weights of the common interface, and the block is not known"
            return (f"`{model_type}`", "", "refused", why) if experts else None
        return (f"`{model_type}`", "", "refused", brief(error))
    blocks = sorted({type(block.module).__name__ for block in found.blocks})
    cells = f"`{model_type}`", ", ".join(f"`{block}`" for block in blocks)
    if family is not None:
        return (*cells, "compared", "")
    kinds = {type(block.module): block for block in found.blocks}
    try:
        said = [proof(kind, block) for kind, block in kinds.items()]
    except foldpar.FoldingError as error:
        return (*cells, "refused", brief(error))
    unproven = [line for line in said if "not compared" in line]
    if unproven:
        return (*cells, "unproven", brief(unproven[0]))
    return (*cells, "proven, its experts alone" if any("experts alone" in line for line in said) else "proven", "")


PROOFS: dict[type, str] = {}


def proof(kind: type, block: Block) -> str:
    """Once for blocks that several types have."""
    if kind not in PROOFS:
        PROOFS[kind] = prove_block(block.name, block.module, block.adapter, block.activation)
    return PROOFS[kind]


def brief(error: object) -> str:
    """The first sentence, on one line of a table."""
    text = " ".join(str(error).split()).replace("|", "\\|").replace("`", "'")
    first = re.split(r"(?<=[.;]) (?=[A-Z])", text)[0]
    return first if len(first) < 240 else first[:237] + "..."


def page() -> str:
    known = compared()
    rows, reasons = [], []
    for model_type in sorted(types_with_experts()):
        cells = row(model_type, known)
        if cells is not None:
            print(*cells, file=sys.stderr, flush=True)
            rows.append(line_of(cells))
            if cells[3]:
                reasons.append(f"- {cells[0]}: {cells[3]}\n")
    return HEAD.format(version=transformers.__version__) + "".join(rows) + REASONS + "".join(reasons)


def line_of(cells: tuple[str, ...]) -> str:
    model_type, blocks, folding, _ = cells
    return f"| {model_type} | {folding} | {blocks} |\n"


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
