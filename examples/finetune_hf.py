"""Fine-tune a Hugging Face MoE model, folded, in one process, on CPU ranks or on GPUs.

    python examples/finetune_hf.py
    torchrun --nproc-per-node 4 examples/finetune_hf.py --tp 2 --ep 4
    torchrun --nproc-per-node 4 examples/finetune_hf.py --preset 1b --ep 4 --shard-stage 1

The model is Qwen3-MoE shaped: a small one with fresh weights, or with ``--model FOLDER`` what ``save_pretrained`` or
``huggingface_hub.snapshot_download`` left there. The text is the Python standard library's source, the tokenizer is
trained on it first. All runs with the same ``--global-batch`` are the same run, however many ranks there are.

``--engine transformers`` runs the same loop over transformers' own parallelism, to compare the two on one machine; that
needs the package ``accelerate`` too.
It ends with a short summary, or with ``--json`` with a line of JSON: losses, tokens per second, peak memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import resource
import sys
import sysconfig
import tempfile
import time
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeConfig

import foldpar
import foldpar.hf

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "1b": {
        "vocab_size": 8192,
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "moe_intermediate_size": 512,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
}
RATES = {"tiny": 3e-3, "1b": 3e-4}


# ---------------------------------------------------------------------------------------------------------------------
# Text.


def library_text(size: int) -> str:
    """The first ``size`` characters of the standard library's source files."""
    text: list[str] = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if size <= 0:
            break
        if "site-packages" not in file.parts and "test" not in file.parts:
            text.append(file.read_text(errors="ignore")[:size])
            size -= len(text[-1])
    return "".join(text)


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer: every text can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def encode(options: argparse.Namespace, windows: int, vocabulary: int) -> Tensor:
    """``[windows, length + 1]`` token ids; by the model's own tokenizer, or one that is trained here."""
    need = windows * (options.length + 1)
    text = library_text(8 * need + 200_000)
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(text[:2_000_000], vocabulary))
    if options.save:
        tokenizer.save_pretrained(options.save)
    ids = tokenizer(text)["input_ids"]
    if len(ids) < need:
        raise SystemExit(f"{need} tokens are wanted and the standard library has {len(ids)}: fewer --steps, please.")
    shuffled = torch.randperm(windows, generator=torch.Generator().manual_seed(options.seed))
    return rearrange(torch.tensor(ids[:need]), "(windows place) -> windows place", windows=windows)[shuffled]


# ---------------------------------------------------------------------------------------------------------------------
# Two engines: what they make of a folder of weights, and what they do around backward.


class Folded:
    """foldpar: ``fold_model``, ``import_``, ``shard_model``; gradients reduced once a step."""

    def __init__(self, options: argparse.Namespace, groups: foldpar.FoldedGroups, device: torch.device) -> None:
        self.groups, self.options, self.device = groups, options, device
        self.data_rank, self.data_ranks = groups.dp_cp.index, groups.dp_cp.size

    def load(self, folder: Path) -> nn.Module:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder), dtype=stored_dtype(self.options)
            )
        plan = foldpar.fold_model(model, self.groups)
        report = foldpar.hf.import_(model, folder, self.groups, device=self.device)
        if self.groups.rank == 0:
            print(f"{plan}\n{report}", file=sys.stderr, flush=True)
        if self.options.shard_stage:
            precision = None
            if stored_dtype(self.options) != compute_dtype(self.options):
                precision = MixedPrecisionPolicy(compute_dtype(self.options), reduce_dtype=torch.float32)
            foldpar.shard_model(
                model,
                self.groups,
                stage=self.options.shard_stage,
                mixed_precision=precision,
                blocks=[] if dense_numbers(model) < FEW else None,
            )
        self.model = model
        return model

    def parameters(self) -> list[dict[str, Any]]:
        return foldpar.parameter_groups(self.model)

    def accumulating(self) -> AbstractContextManager[None]:
        return foldpar.accumulate(self.model)

    def reduce_and_clip(self, max_norm: float) -> Tensor:
        foldpar.reduce_gradients(self.model, self.groups)
        return foldpar.clip_grad_norm_(self.model, max_norm, self.groups)

    def mean(self, value: Tensor) -> float:
        return float(foldpar.all_reduce(value.detach() / self.data_ranks, self.groups.dp_cp, backward="identity"))


class OfTransformers:
    """transformers' own tensor, expert and data parallelism, which reduces gradients as they arise."""

    def __init__(self, options: argparse.Namespace, groups: foldpar.FoldedGroups, device: torch.device) -> None:
        self.groups, self.options, self.device = groups, options, device
        self.world = groups.layout.world
        self.data_rank, self.data_ranks = groups.rank // options.tp, self.world // options.tp

    def load(self, folder: Path) -> nn.Module:
        keywords = {"distributed_config": self._config()} if self.world > 1 else {}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=stored_dtype(self.options), **keywords)
        self.model = model.train() if self.world > 1 else model.train().to(self.device)
        return self.model

    def _config(self) -> Any:
        from transformers.distributed import DistributedConfig

        sizes: dict[str, Any] = {"tp_size": self.options.tp, "fsdp_size": self.data_ranks}
        if stored_dtype(self.options) != compute_dtype(self.options):
            sizes["fsdp_mixed_precision"] = True
        if "ep_size" in {field.name for field in dataclasses.fields(DistributedConfig)}:
            return DistributedConfig(**sizes, ep_size=self.options.ep)
        if self.options.ep not in (1, self.options.tp):  # before 5.20 experts were spread over the lanes, or not at all
            raise SystemExit(
                "This version of transformers has expert parallelism over the lanes only: --ep equal to --tp."
            )
        return DistributedConfig(**sizes, enable_expert_parallel=self.options.ep > 1)

    def parameters(self) -> list[dict[str, Any]]:
        for module in self.model.modules():  # an evaluation leaves FSDP2's outermost parameters whole
            if isinstance(module, FSDPModule):
                module.reshard()
        return [{"params": of_mesh} for of_mesh in self._by_mesh().values()]

    def accumulating(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def reduce_and_clip(self, max_norm: float) -> Tensor:
        norms = []
        for of_mesh in self._by_mesh().values():  # torch's own function takes parameters of one mesh
            norm = torch.nn.utils.get_total_norm([each.grad for each in of_mesh if each.grad is not None])
            norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        total = torch.linalg.vector_norm(torch.stack(norms))
        for of_mesh in self._by_mesh().values():
            torch.nn.utils.clip_grads_with_norm_(of_mesh, max_norm, total)
        return total

    def mean(self, value: Tensor) -> float:
        value = value.detach().clone()
        if self.world > 1:
            dist.all_reduce(value)
        return float(value) / self.world

    def _by_mesh(self) -> dict[Any, list[nn.Parameter]]:
        found: dict[Any, list[nn.Parameter]] = {}
        for parameter in self.model.parameters():
            found.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        return found


FEW = 2**27
"""With fewer numbers in dense layers, one gather of all of them costs less than one for each block."""


def dense_numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." not in name)


Engine = Folded | OfTransformers
ENGINES: dict[str, type[Engine]] = {"foldpar": Folded, "transformers": OfTransformers}


def compute_dtype(options: argparse.Namespace) -> torch.dtype:
    return getattr(torch, options.dtype)


def stored_dtype(options: argparse.Namespace) -> torch.dtype:
    """Sharded bfloat16 runs keep their weights in float32, which costs little once they are shards."""
    return torch.float32 if options.dtype == "bfloat16" and options.shard_stage else compute_dtype(options)


def start_folder(options: argparse.Namespace, groups: foldpar.FoldedGroups, device: torch.device, parent: str) -> Path:
    """The folder of the weights to start from; rank 0 makes one with fresh weights if none is given."""
    if options.model:
        return Path(options.model)
    folder = Path(parent) / "start"
    if groups.rank == 0:
        torch.manual_seed(options.seed)
        config = Qwen3MoeConfig(**PRESETS[options.preset], tie_word_embeddings=False, use_cache=False)
        with torch.device(device):
            AutoModelForCausalLM.from_config(config, dtype=stored_dtype(options)).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Training.


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean cross-entropy of the next token."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    rows = rearrange(wide, "batch length vocab -> (batch length) vocab")
    return F.cross_entropy(rows, rearrange(windows[:, 1:], "batch length -> (batch length)"))


def own_micro_batches(windows: Tensor, engine: Engine, accumulate: int) -> list[Tensor]:
    """This data rank's part of a global batch, in equal pieces."""
    return list(windows.chunk(engine.data_ranks)[engine.data_rank].chunk(accumulate))


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, engine: Engine, accumulate: int) -> float:
    model.eval()
    parts = [loss_of(model, batch) for batch in own_micro_batches(windows, engine, accumulate)]
    model.train()
    return engine.mean(torch.stack(parts).mean())


def train(
    model: nn.Module, windows: Tensor, engine: Engine, options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """The mean loss of every step, and the seconds that it took."""
    rate = RATES[options.preset] if options.rate is None else options.rate
    optimizer = torch.optim.AdamW(
        engine.parameters(),
        lr=rate,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        eps=1e-6,
        fused=engine.device.type == "cuda",
    )
    warmup = max(1, options.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / options.steps)),
    )
    losses: list[float] = []
    ends = [time.perf_counter()]
    bar = tqdm(range(options.steps), desc=options.engine, unit="step", disable=engine.groups.rank != 0)
    for step in bar:
        batch = windows[step * options.global_batch : (step + 1) * options.global_batch].to(engine.device)
        *first, last = own_micro_batches(batch, engine, options.accumulate)
        total = torch.zeros((), device=engine.device)
        with engine.accumulating():
            for micro_batch in first:
                loss = loss_of(model, micro_batch) / options.accumulate
                loss.backward()
                total += loss.detach()
        loss = loss_of(model, last) / options.accumulate
        loss.backward()
        norm = engine.reduce_and_clip(options.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(engine.mean(total + loss.detach()))  # also waits for the device
        bar.set_postfix(loss=f"{losses[-1]:.3f}", norm=f"{float(norm):.2f}")
        ends.append(time.perf_counter())
    return losses, [end - start for start, end in pairwise(ends)]


def plot(path: str, losses: list[float], before: float, after: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(range(1, len(losses) + 1), losses, label="training")
    axes.plot([0, len(losses)], [before, after], "o", label="held-out text, before and after")
    axes.set(xlabel="step", ylabel="cross-entropy per token", title="Fine-tuning")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def peak_memory(device: torch.device, groups: foldpar.FoldedGroups) -> int:
    """Bytes on the rank that needed the most: of the GPU's memory, or of the process's."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        own = torch.cuda.max_memory_allocated(device)
    largest = torch.tensor(own, device=device)
    if groups.layout.world > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default=None, help="a folder of weights to start from, with its tokenizer")
    parser.add_argument("--preset", default="tiny", choices=list(PRESETS), help="the size of a fresh model")
    parser.add_argument("--engine", default="foldpar", choices=list(ENGINES))
    parser.add_argument("--tp", type=int, default=1, help="lanes that share each dense weight")
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts out among them")
    parser.add_argument("--etp", type=int, default=1, help="ranks that share each expert")
    parser.add_argument("--order", default="tp-lane-major", choices=["tp-lane-major", "consecutive"])
    parser.add_argument("--shard-stage", type=int, default=0, choices=[0, 1, 2, 3], help="foldpar.shard_model; 0: not")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--global-batch", type=int, default=16, help="sequences per step, over all ranks")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--rate", type=float, default=None, help="learning rate; by default one for the preset")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None, choices=["cpu", "cuda"], help="by default cuda where there is one")
    parser.add_argument("--dtype", default=None, choices=["float64", "float32", "bfloat16"], help="bfloat16 on GPUs")
    parser.add_argument("--plot", default="finetune_hf.png", help="where the loss curve goes; empty: nowhere")
    parser.add_argument("--save", default=None, help="a new folder for the trained model, as from_pretrained takes it")
    parser.add_argument("--json", action="store_true", help="end with a line of JSON in place of the summary")
    options = parser.parse_args()
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        options.layout = foldpar.solve_layout(world, tp=options.tp, ep=options.ep, etp=options.etp, order=options.order)
    except foldpar.LayoutError as error:
        alone = " This is one process; start several: torchrun --nproc-per-node N examples/finetune_hf.py ..."
        parser.error(f"{error}{alone if world == 1 else ''}")
    data_ranks = world // options.tp
    if options.accumulate < 1 or options.steps < 1:
        parser.error("--accumulate and --steps must be 1 or more")
    if options.global_batch % (data_ranks * options.accumulate):
        parser.error(
            f"--global-batch {options.global_batch} must be a multiple of data ranks * --accumulate = "
            f"{data_ranks} * {options.accumulate}"
        )
    if options.save and Path(options.save).exists():
        parser.error(f"--save {options.save} exists already, and nothing is written over; name a new folder")
    if options.save and options.engine != "foldpar":
        parser.error("--save goes with --engine foldpar")
    return options


def main() -> None:
    options = arguments()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(options.device)
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    layout = options.layout
    with (
        foldpar.create_groups(layout, backend="nccl" if options.device == "cuda" else "gloo") as groups,
        tempfile.TemporaryDirectory() as own_folder,
    ):
        shared: list[Any] = [own_folder]
        if world > 1:
            dist.broadcast_object_list(shared, src=0)
        folder = start_folder(options, groups, device, shared[0])
        vocabulary = PRESETS[options.preset]["vocab_size"]
        windows = [None]
        if groups.rank == 0:
            windows = [encode(options, (options.steps + 1) * options.global_batch, vocabulary)]
        if world > 1:  # the others have waited for both
            dist.broadcast_object_list(windows, src=0)

        engine = ENGINES[options.engine](options, groups, device)
        model = engine.load(folder)
        held_out, training = windows[0][: options.global_batch].to(device), windows[0][options.global_batch :]
        before = evaluate(model, held_out, engine, options.accumulate)
        losses, seconds = train(model, training, engine, options)
        after = evaluate(model, held_out, engine, options.accumulate)
        if options.save:
            written = foldpar.hf.export(model, options.save, groups)
            if groups.rank == 0:
                print(written, file=sys.stderr, flush=True)
        tokens = (options.steps - 1) * options.global_batch * options.length
        memory = peak_memory(device, groups)
        if groups.rank == 0:
            if options.plot:
                plot(options.plot, losses, before, after)
            result = {
                "engine": options.engine,
                "layout": {name: getattr(layout, name) for name in ("world", "tp", "dp", "ep", "etp", "edp", "order")},
                "dtype": options.dtype,
                "shard_stage": options.shard_stage,
                "parameters": parameters_of(folder),
                "loss_before": before,
                "loss_after": after,
                "losses": losses,
                "tokens_per_second": round(tokens / sum(seconds[1:]), 1) if options.steps > 1 else None,
                "peak_memory_bytes": memory,
            }
            print(json.dumps(result) if options.json else summary(result, options), flush=True)


def summary(result: dict[str, Any], options: argparse.Namespace) -> str:
    """The result for people."""
    layout = " ".join(f"{name}={value}" for name, value in result["layout"].items() if name != "order")
    speed = result["tokens_per_second"]
    lines = [
        f"{result['engine']} on {layout}, {result['dtype']}, {result['parameters']:,} parameters",
        f"held-out loss {result['loss_before']:.3f} -> {result['loss_after']:.3f} in {len(result['losses'])} step(s)",
        f"{'too few steps to time' if speed is None else f'{speed:,.0f} tokens/s'}, "
        f"at most {result['peak_memory_bytes'] / 1e9:.2f} GB on a rank",
    ]
    if options.plot:
        lines.append(f"the loss curve is {Path(options.plot).resolve()}")
    if options.save:
        lines.append(f"the trained model is {Path(options.save).resolve()}")
    return "\n".join(lines)


def parameters_of(folder: Path) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
