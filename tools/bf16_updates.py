"""How should bfloat16 parameters keep small updates? The end of a decaying schedule, once for each way.

    python tools/bf16_updates.py [--warm 60] [--steps 60] [--seeds 3]

SmolLM2-135M in 4 bit, LoRA r 8, the quickstart's orders. All ways start from one adapter, trained for ``--warm`` steps at
a constant 5e-4; then each trains ``--steps`` more, cosine from 5e-4 to 0, on the same batches. Reported: the held-out
loss; how far the final parameters are from the float32 master's, as a share of how far those moved; the share of
parameters that did not move at all in the last quarter. Written up in tools/LOG.md.
"""

import argparse
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qlite import device
from qlite.data.batches import TokenBatches, batches_of
from qlite.methods.base import trainable_tensors
from qlite.methods.lora import LoRA
from qlite.model.load import Base
from qlite.optim.build import FlatOptimizer, Optimizer
from qlite.optim.schedule import Schedule
from qlite.recipe.read import read_recipe
from qlite.training.step import Stepper
from qlite.verb import run_verb

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
LR, ROWS = 5e-4, 4
METHOD = LoRA(rank=8, alpha=16)
CPU = torch.device("cpu")


class Plain:
    """Round to the nearest bfloat16 and forget the rest."""

    extra_bytes = 0

    def open(self, weight: Tensor) -> Tensor:
        return weight.float()

    def close(self, weight: Tensor, new: Tensor) -> None:
        weight.copy_(new)


class Stochastic(Plain):
    """Round up or down with a chance in proportion to the nearness (right on average)."""

    def close(self, weight: Tensor, new: Tensor) -> None:
        bits = new.view(torch.int32) + torch.randint(0, 1 << 16, new.shape, dtype=torch.int32)
        weight.copy_((bits & -65536).view(torch.float32))


class Kahan(Plain):
    """Carry what rounding dropped in a bfloat16 of its own (compensated summation)."""

    extra_bytes = 2

    def __init__(self, weight: Tensor):
        self.carry = torch.zeros_like(weight)

    def close(self, weight: Tensor, new: Tensor) -> None:
        update = new - weight.float() + self.carry.float()
        rounded = (weight.float() + update).bfloat16()
        self.carry.copy_(update - (rounded.float() - weight.float()))
        weight.copy_(rounded)


class Master(Plain):
    """Keep a float32 copy beside the bfloat16 weight."""

    extra_bytes = 4

    def __init__(self, weight: Tensor):
        self.master = weight.float()

    def open(self, weight: Tensor) -> Tensor:
        return self.master

    def close(self, weight: Tensor, new: Tensor) -> None:
        self.master = new
        weight.copy_(new)


def install(optimizer: FlatOptimizer, kind: type | None) -> None:
    """Let ``optimizer`` keep its weights the way of ``kind``; None: qlite's own (weight and 16-bit remainder)."""
    if kind is None:
        return
    for flat in optimizer.flats:
        way = kind(flat.weight) if kind in (Kahan, Master) else kind()

        def open_(flat=flat, way=way):
            flat.master.data, flat.master.grad = way.open(flat.weight), flat.grad

        def close(flat=flat, way=way):
            way.close(flat.weight, flat.master.data)
            flat.master.grad, flat.master.data = None, flat.grad.new_empty(0)
            flat.grad.zero_()

        flat.open, flat.close = open_, close


WAYS = {
    "plain bfloat16": Plain,
    "stochastic rounding": Stochastic,
    "Kahan sum": Kahan,
    "float32 copy": Master,
    "16-bit remainder (qlite)": None,
}


def main(argv: list[str]) -> None:
    """Run the experiment and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", type=int, default=60)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    recipe = read_recipe(RECIPE)
    loaded = Base(model=recipe.base.model, sha256=recipe.base.sha256).load(CPU, lambda *_: None)
    data = recipe.data.load(loaded.tokenizer, recipe.train.tokens, print)
    test = list(batches_of(sorted(data.test, key=len), 25, data.encoder.pad_id))
    device.seed_all(0)
    METHOD.attach(loaded.model)
    stepper = Stepper(loaded.model, METHOD, recipe.memory.loss_chunk, CPU)
    order = TokenBatches(data.train, ROWS, 1, 0, data.encoder.pad_id)
    train(stepper, order, args.warm, first=1, schedule=Schedule(name="constant"), kind=None, seed=0)
    tensors = trainable_tensors(loaded.model)
    start = {name: p.detach().clone() for name, p in tensors.items()}
    rows: dict[str, list[tuple[float, Tensor, float]]] = {way: [] for way in WAYS}
    for seed in range(args.seeds):
        for way, kind in WAYS.items():
            for name, p in tensors.items():
                p.data = start[name].clone()
                p._post_accumulate_grad_hooks.clear()
            still = train(stepper, order, args.steps, args.warm + 1 + seed * args.steps, Schedule(name="cosine"), kind, seed)
            final = torch.cat([p.detach().float().flatten() for p in tensors.values()])
            rows[way].append((stepper.evaluate(test), final, still))
            print(f"seed {seed}  {way}: held-out loss {rows[way][-1][0]:.5f}", flush=True)
    show(rows, torch.cat([t.float().flatten() for t in start.values()]))


def train(stepper: Stepper, order: TokenBatches, steps: int, first: int, schedule: Schedule, kind: type | None, seed: int) -> float:
    """Train ``steps`` steps; return the share of parameters that had one value throughout the last quarter."""
    optimizer = Optimizer(name="torch_adamw", lr=LR).build(METHOD.param_groups(stepper.model, LR), CPU)
    install(optimizer, kind)
    device.seed_all(seed)
    then = None
    for step in range(1, steps + 1):
        optimizer.set_lr_factor(schedule.factor(step, steps))
        stepper.step(order.step(first + step - 1), optimizer, clip_norm=1.0)
        if step == steps - steps // 4:
            then = optimizer.flats[0].weight.clone()
    return (optimizer.flats[0].weight == then).float().mean().item()


def show(rows: dict[str, list[tuple[float, Tensor, float]]], start: Tensor) -> None:
    """Print one line a way: mean and range over the seeds."""
    table = Table(title="small updates at the end of a cosine schedule")
    for heading in ("way", "extra bytes a parameter", "held-out loss", "off the float32 copy", "did not move at the end"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for way, kind in WAYS.items():
        losses = [loss for loss, _, _ in rows[way]]
        off = [
            ((final - exact).norm() / (exact - start).norm()).item()
            for (_, final, _), (_, exact, _) in zip(rows[way], rows["float32 copy"], strict=True)
        ]
        still = mean(share for _, _, share in rows[way])
        extra = 2 if kind is None else kind.extra_bytes
        spread = f"{mean(losses):.5f} ({min(losses):.5f} .. {max(losses):.5f})"
        table.add_row(way, str(extra), spread, f"{mean(off):.2%}", f"{still:.1%}")
    Console(width=130).print(table)


if __name__ == "__main__":
    run_verb(main)
