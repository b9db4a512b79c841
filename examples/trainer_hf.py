"""Fine-tune a Hugging Face MoE model with transformers' own ``Trainer``, with foldpar's exchange of rows inside it.

    torchrun --nproc-per-node 4 examples/trainer_hf.py --ep 2
    torchrun --nproc-per-node 4 examples/trainer_hf.py --ep 2 --implementation all_to_all

Two lines are foldpar's: the call of ``register_with_transformers``, and its name in the ``DistributedConfig``. The rest
is a ``Trainer`` as ever. Model and text are those of ``finetune_hf.py``: Qwen3-MoE shaped with fresh weights, and the
Python standard library's source, of which each line is to be continued from its first half (the rest has no labels).

``--tp`` needs GPUs: on the CPU, accelerate has no tensor parallelism for the ``Trainer``. Nothing is saved on the way,
since transformers resumes no model that it spread when loading. It ends with a line of JSON: losses and gradient norms
as the ``Trainer`` logged them, tokens per second, peak memory of the rank that needed the most.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from finetune_hf import PRESETS, RATES, library_text, train_tokenizer
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

import foldpar.hf


class Halves(Dataset[dict[str, Tensor]]):
    """Windows of source, whose first half is given and whose second half is to be written."""

    def __init__(self, windows: int, length: int, vocabulary: int) -> None:
        self.windows = encoded(windows * length, vocabulary).view(windows, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        ids = self.windows[place]
        given = torch.arange(len(ids)) < len(ids) // 2 + place % 5  # sequences differ in how much is given
        return {"input_ids": ids, "labels": ids.masked_fill(given, -100)}


@cache
def encoded(tokens: int, vocabulary: int) -> Tensor:
    text = library_text(8 * tokens + 100_000)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(text[:1_000_000], vocabulary))
    return torch.tensor(tokenizer(text)["input_ids"][:tokens])


class Clock(TrainerCallback):
    """Seconds from the end of the first step on."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0
        self.steps = 0

    def on_step_end(self, arguments: Any, state: Any, control: Any, **others: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if not self.began:
            self.began = now
            return
        self.steps, self.seconds = self.steps + 1, now - self.began


def start_folder(options: argparse.Namespace, parent: str) -> str:
    """Fresh weights, written by rank 0: the ``Trainer`` wants a model that was loaded spread."""
    folder = str(Path(parent) / "start")
    if int(os.environ["RANK"]) == 0:
        torch.manual_seed(0)
        config = Qwen3MoeConfig(**PRESETS[options.preset], tie_word_embeddings=False, use_cache=False)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    dist.barrier()
    return folder


def load(folder: str, options: argparse.Namespace) -> Any:
    foldpar.hf.register_with_transformers(one_sided=False if options.messages else None)
    distributed = DistributedConfig(
        tp_size=options.tp,
        fsdp_size=int(os.environ["WORLD_SIZE"]) // options.tp,
        ep_size=options.ep,
        ep_implementation=options.implementation,
        fsdp_mixed_precision=options.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=distributed)


def trained(
    options: argparse.Namespace, folder: str, output: str, callbacks: tuple[TrainerCallback, ...] = ()
) -> dict[str, Any]:
    data_ranks = int(os.environ["WORLD_SIZE"]) // options.tp
    windows = options.steps * options.batch * options.accumulate * data_ranks
    clock = Clock()
    trainer = Trainer(
        load(folder, options),
        TrainingArguments(
            output,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            max_grad_norm=options.clip,
            learning_rate=RATES[options.preset],
            lr_scheduler_type="constant",
            gradient_checkpointing=options.checkpointing,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Halves(windows, options.length, PRESETS[options.preset]["vocab_size"]),
        callbacks=[clock, *callbacks],
    )
    trainer.train()
    logged = [each for each in trainer.state.log_history if "loss" in each]
    tokens = clock.steps * options.batch * options.accumulate * data_ranks * options.length
    return {
        "implementation": options.implementation,
        "losses": [float(each["loss"]) for each in logged],
        "norms": [float(each["grad_norm"]) for each in logged],
        "tokens_per_second": round(tokens / clock.seconds, 1) if clock.seconds else None,
        "peak_bytes": peak_memory(),
    }


def peak_memory() -> int:
    """Bytes on the rank that needed the most: of the GPU's memory, or of the process's."""
    if torch.cuda.is_available():
        own = torch.tensor(torch.cuda.max_memory_allocated(), device="cuda")
    else:
        own = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    dist.all_reduce(own, op=dist.ReduceOp.MAX)
    return int(own)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--implementation", default="foldpar", help='"foldpar", or one of transformers\' own')
    parser.add_argument("--preset", default="tiny", choices=list(PRESETS), help="the size of a fresh model")
    parser.add_argument("--tp", type=int, default=1, help="lanes that share each dense weight")
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts out among them")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2, help="sequences per micro-batch and data rank")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward")
    parser.add_argument("--messages", action="store_true", help="no rows of foldpar through memory that GPUs share")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16; weights stay float32")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 4 examples/trainer_hf.py --ep 2")
    if options.tp > 1 and not torch.cuda.is_available():
        parser.error("--tp needs GPUs: on the CPU, accelerate has no tensor parallelism for the Trainer")
    return options


@contextmanager
def job_in_a_folder() -> Iterator[str]:
    """All ranks of torchrun, with a folder of rank 0 that is gone afterwards."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    with tempfile.TemporaryDirectory() as own_folder:
        shared: list[Any] = [own_folder]
        dist.broadcast_object_list(shared, src=0)
        yield shared[0]
        dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    options = arguments()
    with job_in_a_folder() as folder:
        result = trained(options, start_folder(options, folder), folder)
        if dist.get_rank() == 0:
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
