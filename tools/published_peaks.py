"""Our planned peaks beside those that other systems have published, configuration by configuration, as a table for README.

python tools/published_peaks.py            # all of them, about three minutes
python tools/published_peaks.py --only 8B  # those whose name contains "8B"

Ours are plans: tensor bytes from a trace of the training step (``python -m qlite.plan``), on no card. Theirs are what their authors
measured or state; what a "peak" is differs (torchtune: active; LLaMA-Factory and Unsloth: rounded, of the whole card).
"""

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from qlite.memory import terms
from qlite.memory.plan import MemoryPlan
from qlite.model.shapes import base_shapes
from qlite.recipe.read import read_recipe
from qlite.training.forecast import Workload, forecast, worst_workload
from qlite.units import GIB

RECIPE = """
[base]
model = "meta-llama/Llama-2-7b-hf"
[method]
rank = 8
[data]
train = "rows.jsonl"
[train]
steps = 1
"""
LOWER = ["memory.loss_chunk=128", "memory.saved_inputs=host", "memory.mlp_chunk=512"]


@dataclass(frozen=True)
class Published:
    """A configuration, and what it takes elsewhere."""

    name: str
    keys: list[str]
    theirs: str
    limit: float
    """GiB that ours is to stay below."""
    more: list[str] = field(default_factory=list)
    """Keys of ours that others have no like of."""


def _llama2(tokens: int, theirs: str, limit: float, more: list[str] = LOWER) -> Published:
    keys = ["train.micro_batch=1", f"train.tokens={tokens}"]
    return Published(f"Llama-2-7B, 1 x {tokens}, r 8 on all", keys, theirs, limit, more)


PUBLISHED = [
    Published(
        "Llama-3.1-8B, 2 x 2048 packed, r 8 on q, v, o, MLP",
        ["base.model=meta-llama/Llama-3.1-8B", "train.micro_batch=2", "train.tokens=2048", "train.packing=true",
         'method.targets=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]'],
        "7.4 GiB, torchtune", 7.4, ["memory.loss_chunk=128", "memory.mlp_chunk=1024"],
    ),
    _llama2(1024, "5 GB Unsloth, 6 GB LLaMA-Factory", 5),
    _llama2(2048, "6 GB Unsloth, 7 GB LLaMA-Factory", 6),
    _llama2(4096, "7 GB Unsloth, 9 GB LLaMA-Factory", 7),
    _llama2(8192, "8 GB Unsloth, 12 GB LLaMA-Factory", 8),
    _llama2(16384, "10 GB Unsloth, 19 GB LLaMA-Factory", 10),
    Published(
        "Llama-3.2-3B, 2 x 4096 packed, r 8 on all",
        ["base.model=meta-llama/Llama-3.2-3B", "train.micro_batch=2", "train.tokens=4096", "train.packing=true"],
        "4.6 GiB, torchtune", 4.6, LOWER,
    ),
    Published(
        "LLaMA-7B Alpaca, 4 x 512, r 8 on q, v",
        ["base.model=huggyllama/llama-7b", "train.micro_batch=4", "train.tokens=512", 'method.targets=["q_proj", "v_proj"]'],
        "21 GB, alpaca-lora (8 bit)", 8,
    ),
    Published(
        "Llama-2-7B, 1 x 1304, r 8 on q, v",
        ["train.micro_batch=1", "train.tokens=1304", 'method.targets=["q_proj", "v_proj"]'],
        "13.84 GB, litgpt", 13.84 / 1.0737,
    ),
    Published(
        "Llama-3.1-8B streamed, 1 x 512, r 8 on all",
        ["base.model=meta-llama/Llama-3.1-8B", "train.micro_batch=1", "train.tokens=512"],
        "3.32 GB, Soup", 3.32 / 1.0737,
        ["memory.base=host", "memory.loss_chunk=128", "memory.embedding=host", "base.embedding_bits=8", "base.head_bits=8"],
    ),
]  # fmt: skip


def main() -> None:
    """Print the table; write it with all terms to build/published_peaks.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--terms", action="store_true", help="print the terms of each peak, too")
    args = parser.parse_args()
    rows, kept = [], []
    for each in (each for each in PUBLISHED if args.only in each.name):
        for more in ([], each.more) if each.more else ([],):
            plan = planned([*each.keys, *more])
            peak = plan.peak
            rows.append((each, more, plan))
            told = ", ".join(f"{term} {peak.terms[term] / GIB:.2f}" for term in terms.ALL if peak.terms.get(term, 0) > 0.005 * GIB)
            verdict = "below" if peak.bytes < each.limit * GIB else "ABOVE"
            extra = f" with {', '.join(more)}" if more else ""
            print(f"| {each.name}{extra} | {each.theirs} | {peak.bytes / GIB:.2f} | {verdict} {each.limit:.2f} | {told} |", flush=True)
            kept.append({"name": each.name, "keys": [*each.keys, *more], "theirs": each.theirs, **plan.as_record()})
    Path("build").mkdir(exist_ok=True)
    Path("build/published_peaks.json").write_text(json.dumps(kept, indent=2))


def planned(keys: list[str]) -> MemoryPlan:
    """Return the plan of the recipe with ``keys``: of its training steps alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(RECIPE)
        recipe = read_recipe(path, keys)
    shapes = base_shapes(recipe.base, lambda *_: None)
    return MemoryPlan(forecast(recipe, shapes, Workload(worst_workload(recipe).train)).peaks(), None, "")


if __name__ == "__main__":
    main()
