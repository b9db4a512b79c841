"""Train a sharded MoE language model that may be killed at any moment: started again, it goes on where it was.

    torchrun --nproc-per-node 4 examples/train_sharded.py --tp 2 --ep 4 --stage 3
    torchrun --nproc-per-node 4 --max-restarts 100 examples/train_sharded.py --tp 2 --ep 4 --stage 3

The second form also starts itself again when a rank dies. Nothing but the folder of checkpoints is remembered: every
run loads the newest complete one, and the batch of a step follows from the number of the step alone. So in the same
layout the weights end up bit by bit as if nothing had happened. The next run may also have another layout or stage, or
more ``--steps``; a run that has ended does nothing more. The model, its fold and the text are those of
``train_folded_lm.py``. One run at a time may use a folder.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from byte_lm import ByteLM, Config
from einops import rearrange
from torch import Tensor
from torch.distributed.tensor.parallel import loss_parallel
from train_folded_lm import SourceText, fold, mean_loss

import foldpar

WINDOWS = 4096  # of text, from which every step draws its batch


def train(options: argparse.Namespace, groups: foldpar.FoldedGroups, device: torch.device) -> None:
    """From the newest checkpoint, or from the start, to the last step."""
    torch.manual_seed(0)
    model = fold(ByteLM(Config()).to(device, getattr(torch, options.dtype)), groups)
    if options.stage:
        foldpar.shard_model(model, groups, stage=options.stage)
    optimizer = torch.optim.AdamW(foldpar.parameter_groups(model), lr=options.rate)
    text = SourceText(WINDOWS, options.length, device)

    done = resume(options.folder, model, optimizer, groups)
    saving = None
    for step in range(done + 1, options.steps + 1):
        loss, norm = take_step(model, optimizer, groups, batches_of_step(text, step, options, groups), options.max_norm)
        say(f"step {step} loss {loss:.6f} norm {norm:.6f}", groups)
        if step % options.save_every == 0 or step == options.steps:
            path = options.folder / f"step-{step}"
            saving = foldpar.save_checkpoint(
                path, model, optimizer, groups, step=step, keep=options.keep, asynchronous=options.asynchronous
            )
    if saving is not None:
        saving.wait()
    say(f"finished {options.steps} steps", groups)


def resume(folder: Path, model: ByteLM, optimizer: torch.optim.Optimizer, groups: foldpar.FoldedGroups) -> int:
    """Load the newest complete checkpoint, if there is one; returns how many steps are done."""
    found = [foldpar.latest_checkpoint(folder) if groups.rank == 0 else None]
    dist.broadcast_object_list(found, src=0)  # one rank looks, so that all load the same
    info = foldpar.load_checkpoint(found[0], model, optimizer, groups)
    say(f"resuming after step {info.step}, saved by {info.layout!r}" if info.path else "starting", groups)
    return info.step or 0


def batches_of_step(
    text: SourceText, step: int, options: argparse.Namespace, groups: foldpar.FoldedGroups
) -> list[Tensor]:
    """This data rank's micro-batches ``[sequences, length + 1]`` of a step: its share of the same draw on every rank.

    The generator is made from the number of the step, so there is no state of it to save, or to lose.
    """
    drawn = torch.randint(len(text), (options.batch,), generator=torch.Generator().manual_seed(step))
    by_rank = "(ranks micro_batches sequences) -> ranks micro_batches sequences"
    own = rearrange(drawn, by_rank, ranks=groups.dp_cp.size, micro_batches=options.micro_batches)[groups.dp_cp.index]
    return [text.windows[windows.to(text.windows.device)] for windows in own]


def take_step(
    model: ByteLM,
    optimizer: torch.optim.Optimizer,
    groups: foldpar.FoldedGroups,
    batches: list[Tensor],
    max_norm: float,
) -> tuple[float, float]:
    """One step over several micro-batches; returns the mean loss over all data ranks, and the gradients' norm."""
    *others, last = batches
    with foldpar.accumulate(model):
        losses = [backward(model, batch, len(batches)) for batch in others]
    losses.append(backward(model, last, len(batches)))
    foldpar.reduce_gradients(model, groups)
    norm = foldpar.clip_grad_norm_(model, max_norm, groups)
    optimizer.step()
    optimizer.zero_grad()
    mean = torch.stack(losses).sum() / groups.dp_cp.size
    return float(foldpar.all_reduce(mean, groups.dp_cp, backward="identity")), float(norm)


def backward(model: ByteLM, batch: Tensor, micro_batches: int) -> Tensor:
    with loss_parallel():
        loss = mean_loss(model, batch) / micro_batches
        loss.backward()
    return loss.detach().full_tensor()


def say(text: str, groups: foldpar.FoldedGroups) -> None:
    if groups.rank == 0:
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tp", type=int, default=2, help="lanes that share each dense weight")
    parser.add_argument("--ep", type=int, default=4, help="ranks that share the experts out among them")
    parser.add_argument("--etp", type=int, default=1, help="ranks that share each expert")
    parser.add_argument("--order", default="tp-lane-major", choices=["tp-lane-major", "consecutive"])
    parser.add_argument("--stage", type=int, default=3, choices=[0, 1, 2, 3], help="of shard_model; 0: not sharded")
    parser.add_argument("--steps", type=int, default=40, help="where training ends")
    parser.add_argument("--save-every", type=int, default=5, help="steps between two checkpoints")
    parser.add_argument("--keep", type=int, default=2, help="checkpoints to keep, the newest ones")
    parser.add_argument("--folder", type=Path, default=Path("runs/train_sharded"), help="of the checkpoints")
    parser.add_argument("--asynchronous", action="store_true", help="write checkpoints in the background")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step, over all data ranks")
    parser.add_argument("--micro-batches", type=int, default=2, help="parts of a step on each data rank")
    parser.add_argument("--length", type=int, default=64, help="bytes per sequence")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of AdamW")
    parser.add_argument("--max-norm", type=float, default=1.0, help="gradients are clipped to this norm")
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cpu: over Gloo, cuda: over NCCL")
    options = parser.parse_args()

    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 4 examples/train_sharded.py")
    for name in ("steps", "save_every", "keep", "micro_batches"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        layout = foldpar.solve_layout(
            int(os.environ["WORLD_SIZE"]), tp=options.tp, ep=options.ep, etp=options.etp, order=options.order
        )
    except foldpar.LayoutError as error:
        parser.error(str(error))
    parts = layout.dp * options.micro_batches
    if options.batch < 1 or options.batch % parts:
        parser.error(
            f"--batch {options.batch} is no multiple of dp * micro-batches = {layout.dp} * {options.micro_batches}"
        )
    device = torch.device(options.device)
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    with foldpar.create_groups(layout, backend="nccl" if options.device == "cuda" else "gloo") as groups:
        train(options, groups, device)


if __name__ == "__main__":
    main()
