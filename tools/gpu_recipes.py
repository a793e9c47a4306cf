"""What tools/gpu_check.py runs at full size: the shipped card recipes with random weights, none of which lies on a disk.

Each recipe is given the memory that its card shows programs, whatever the card in hand has more: torch takes no more than that less
a CUDA context, and the run plans for that. So a large card shows whether a recipe fits a small one, but for the context's own size.
"""

import json
import string
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from gpu_memory import planned_and_measured
from gpu_promises import Bench, Result, skipped, told
from torch import Tensor

from qlite import device
from qlite.memory.plan import CONTEXT_BYTES, VISIBLE_SHARE
from qlite.model.checkpoint import INDEX_FILE, SafetensorsCheckpoint
from qlite.model.known import known_config
from qlite.model.load import PLAIN, dense_shapes, empty_model
from qlite.offload import window
from qlite.recipe.read import read_recipe
from qlite.recipe.schema import Recipe
from qlite.units import GIB
from tests.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[1]
SMALLEST = "qwen0.5b_4gb"
SHARD_BYTES = 2 * GIB
LEAST_SHARE = 0.95
"""Of what a card is sold with, which it shows programs at least: one of 8 GB can show 7.7."""
MOST_ACCUMULATION = 4
"""Micro-batches of a step: more take as much memory and more time."""


def recipes(bench: Bench) -> Iterator[Result]:
    """Three steps of every card recipe at its full size, in the memory of its card: they fit, as planned."""
    if not bench.has_card:
        yield skipped("card recipes")
        return
    for path in sorted((ROOT / "recipes").glob("*_*gb.toml")):
        name, gib = path.stem, int(path.stem.rpartition("_")[2].removesuffix("gb"))
        if bench.is_quick and name != SMALLEST:
            continue
        if gib * GIB * LEAST_SHARE > device.total_memory(bench.where):
            yield skipped(name, "this card is smaller")
            continue
        started = time.perf_counter()
        with random_weights(), card_of(bench, gib):
            found = planned_and_measured(bench, name, full_size(bench, path))
            # The kernels of every recipe before are loaded, too.
            yield from (result for result in found if not result.name.endswith("CUDA context"))
        yield told(f"{name}: all of it", f"{time.perf_counter() - started:.0f} s")


def full_size(bench: Bench, path: Path, **changes: object) -> Recipe:
    """Return the recipe of ``path`` for three steps over a base of its own sizes and lines that are full; ``changes`` by full key."""
    recipe, folder = read_recipe(path).having(changes), bench.part(path.stem)
    half = recipe.train.tokens // 2 - 20
    for name, letters in {"train": string.ascii_lowercase, "test": "0123"}.items():
        rows = [json.dumps({"prompt": one * half, "completion": (other + one) * (half // 2)}) for one in letters for other in "xyz"]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    keys = {
        "base.model": str(write_sizes(folder / "base", recipe.base.model)),
        "base.cache": False,
        "schedule.warmup_steps": 1,
        "data.train": str(folder / "train.jsonl"),
        "data.test": str(folder / "test.jsonl"),
        "data.held_out_rows": 0,
        "data.template": "auto",
        "train.steps": 3,
        "train.epochs": None,
        "train.eval_every": 0,
        "train.accumulation": min(recipe.train.accumulation, MOST_ACCUMULATION),
        "train.exact_match_rows": 2,
        "train.answer_tokens": 8,
        "output.dir": str(folder / "run"),
        "parallel.device": bench.where.type,
    }
    return recipe.having(keys)


def write_sizes(folder: Path, model: str) -> Path:
    """Write a folder that looks like the files of the known ``model``, its weights a hole in the file, and a tokenizer."""
    config = known_config(model)
    empty = empty_model(config, PLAIN, torch.bfloat16, "cpu")
    shapes = {name: shape for name, shape in dense_shapes(empty).items() if name not in empty.all_tied_weights_keys}
    config.architectures = [type(empty).__name__]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    shards: list[dict] = [{}]
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        shards[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        if end > SHARD_BYTES:
            shards.append({})
            end = 0
    weight_map = {}
    for number, entries in enumerate(filter(None, shards)):
        header = json.dumps(entries).encode()
        weight_map |= dict.fromkeys(entries, f"model-{number}.safetensors")
        with (folder / f"model-{number}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + max(entry["data_offsets"][1] for entry in entries.values()))
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder


@contextmanager
def random_weights() -> Iterator[None]:
    """Let every tensor that is read from a file be random numbers of its shape; those of one vector be ones, as norms begin."""
    pool = (torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def read(checkpoint: SafetensorsCheckpoint, name: str) -> Tensor:
        # A window: as a file's pages, what is read is no memory of the run's.
        shape, dtype = torch.Size(checkpoint.shapes()[name]), checkpoint.dtypes()[name]
        if len(shape) == 1:
            return window(lambda: torch.ones(shape, dtype=dtype))
        return window(lambda: pool.repeat(-(-shape.numel() // len(pool)))[: shape.numel()].view(shape).to(dtype))

    with patch.object(SafetensorsCheckpoint, "read", read):
        yield


@contextmanager
def card_of(bench: Bench, gib: int) -> Iterator[None]:
    """Let a run find a card of ``gib`` GiB, with a context on it: it plans for that, and torch takes no byte more."""
    device.free_cached(bench.where)
    whole = device.total_memory(bench.where)
    visible = min(int(gib * GIB * VISIBLE_SHARE), whole)
    limit = visible - CONTEXT_BYTES
    torch.cuda.set_per_process_memory_fraction(limit / whole)
    try:
        with (
            patch.object(device, "total_memory", lambda _: visible),
            patch.object(device, "free_memory", lambda _: limit - torch.cuda.memory_reserved()),
        ):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
