"""Useful tokens a second of a recipe's own data: padded as the rows come, grouped by length, and packed.

python tools/packing_speed.py recipes/instruct.toml [--rounds 5] [--tokens 512]
python tools/packing_speed.py recipes/instruct.toml --drawn        # lengths as a large instruction set has them: mean 110, up to 512

Each round trains one step of each way in turn, all with about the same number of tokens a micro-batch, padding counted: --tokens.
Useful are tokens that are no padding. The loss is not compared: the same rows, packed or not, give the same gradient
(tests/model/test_packing.py). "By products" is the ratio that the products alone would give: those of the blocks are made for padding,
too, and for a row three times (forward, again, backward); the head's are made twice, and only for tokens that are trained, which padding
is in no way. The rest of the difference is attention, which each document has on its own, and what every token costs beside products.
"""

import argparse
import time
from collections.abc import Sequence
from math import log
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from qlite import device
from qlite.data.batches import Batch, TokenBatches
from qlite.data.encode import Encoded
from qlite.model.checkpointing import checkpoint_blocks
from qlite.optim.build import FlatOptimizer
from qlite.quant.linear import QuantLinear
from qlite.recipe.read import read_recipe
from qlite.training.step import Stepper
from qlite.verb import run_verb


def main(argv: list[str]) -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a micro-batch, and of a packed line")
    parser.add_argument("--drawn", action="store_true", help="not the recipe's rows, but random ones with lengths of a log-normal law")
    args = parser.parse_args(argv)
    recipe = read_recipe(args.recipe)
    where = device.pick_device("auto")
    device.keep_freed_memory()
    data = recipe.data.load(recipe.base.tokenizer(lambda *_: None), recipe.train.tokens, print)
    model = recipe.base.load(where, lambda *_: None).model
    recipe.base.compile(where, lambda *_: None)
    device.seed_all(0)
    recipe.method.attach(model)
    if recipe.memory.checkpointing != "none":
        checkpoint_blocks(model)
    stepper = Stepper(model, recipe.method, recipe.memory.loss_chunk, where)
    optimizer = recipe.optimizer.build(recipe.method.param_groups(model, recipe.optimizer.lr), where)
    rows = drawn_rows(2000, args.tokens, model.config.vocab_size) if args.drawn else data.train
    ways = batches_of_each_way(rows, data.encoder.pad_id, args.tokens, args.rounds + 1)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, batches in ways.items():
            speed = useful_speed(stepper, optimizer, batches[number])
            if number:  # the first round warms kernels and caches
                speeds[name].append(speed)
    show(ways, speeds, share_of_head(model))


def share_of_head(model: nn.Module) -> float:
    """Return the head's share of a step's products when nothing is padded and every token is trained."""
    blocks = sum(module.in_features * module.out_features for module in model.modules() if isinstance(module, QuantLinear))
    head = 2 * model.config.vocab_size * model.config.hidden_size
    return head / (head + 3 * blocks)


def drawn_rows(count: int, longest: int, vocabulary: int) -> list[Encoded]:
    """Return rows of random ids whose lengths have a mean near 110 and a long tail."""
    chance = torch.Generator().manual_seed(0)
    lengths = torch.empty(count).log_normal_(log(110) - 0.8**2 / 2, 0.8, generator=chance).round().clamp(8, longest).int().tolist()
    return [Encoded(torch.randint(10, vocabulary, (n,), generator=chance).tolist(), [True] * n) for n in lengths]


def batches_of_each_way(all_rows: Sequence[Encoded], pad: int, tokens: int, count: int) -> dict[str, list[Batch]]:
    """Return ``count`` micro-batches of about ``tokens`` tokens each, by the name of the way."""
    rows = max(1, round(tokens / float(np.mean([len(row) for row in all_rows]))))
    order = torch.randperm(len(all_rows), generator=torch.Generator().manual_seed(0)).tolist()
    as_they_come = [Batch.of([all_rows[i] for i in order[n * rows : (n + 1) * rows]], pad) for n in range(count)]
    grouped = TokenBatches(all_rows, rows, 1, 0, pad)
    packed = TokenBatches(all_rows, 1, 1, 0, pad, tokens)
    # From step 2 on: the first is the largest of all, on purpose.
    return {
        "padded, as they come": as_they_come,
        "padded, grouped by length": [grouped.step(n + 2)[0] for n in range(count)],
        "packed": [packed.step(n + 2)[0] for n in range(count)],
    }


def useful_speed(stepper: Stepper, optimizer: FlatOptimizer, batch: Batch) -> float:
    """Train one step; return the tokens a second that were no padding."""
    start = time.perf_counter()
    stepper.step([batch], optimizer, 1.0)
    return batch.tokens / (time.perf_counter() - start)


def show(ways: dict[str, list[Batch]], speeds: dict[str, list[float]], head: float) -> None:
    """Print each way's speed over all its rounds, its ratio to the first way's, and the ratio that fill and products would give."""
    table = Table(title="useful tokens a second")
    for heading in ("", "no padding", "tokens/s", "range", "ratio", "by fill", "by products"):
        table.add_column(heading, justify="left" if not heading else "right")
    filled = {name: sum(b.tokens for b in batches[1:]) / sum(b.size for b in batches[1:]) for name, batches in ways.items()}
    overall = {
        name: sum(b.tokens for b in batches[1:]) / sum(b.tokens / speed for b, speed in zip(batches[1:], speeds[name], strict=True))
        for name, batches in ways.items()
    }
    first = next(iter(ways))
    for name, values in speeds.items():
        by_products = ((1 - head) / filled[first] + head) / ((1 - head) / filled[name] + head)
        ratios = [overall[name] / overall[first], filled[name] / filled[first], by_products]
        span = f"{min(values):.0f}-{max(values):.0f}"
        table.add_row(name, f"{filled[name]:.1%}", f"{overall[name]:.0f}", span, *(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)


if __name__ == "__main__":
    run_verb(main)
