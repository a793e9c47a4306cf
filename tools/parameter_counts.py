"""What LoRA's paper counts, counted again: trained parameters, checkpoint and memory against full training with Adam.

    python tools/parameter_counts.py             # GPT-3 175B and LLaMA-7B, rank 4 on queries and values: about two minutes
    python tools/parameter_counts.py --only LLaMA --rank 8

The tables are written as counts.md under --out, and counts.png where matplotlib is there.

Hu et al. 2021, arXiv:2106.09685, abstract and section 4.2: for GPT-3 175B 10,000 times fewer trained parameters, 3 times less memory
(1.2 TB -> 350 GB), a checkpoint of 35 MB for one of 350 GB. Full training is arithmetic, bytes a parameter: the paper does not say which
it counts.
LoRA's memory is qlite's plan, a trace of the training step on tensors without bytes; no weight is read. GB and TB are 10^9 and 10^12, as
in the paper. OPT has GPT-3's shapes (Zhang et al. 2022, arXiv:2205.01068, table 1) with linears that can be told apart.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from pictures import open_pyplot
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from qlite.errors import RecipeError
from qlite.files import write_text
from qlite.memory import terms
from qlite.memory.ledger import Peak
from qlite.methods.base import trainable_count
from qlite.model.known import known_config
from qlite.model.load import dense_shapes
from qlite.model.shapes import BaseShapes
from qlite.recipe.read import build_recipe
from qlite.recipe.schema import Recipe
from qlite.training.forecast import OPTIMIZER_STEP, STEP, Workload, forecast, worst_workload
from qlite.verb import run_verb

GB, TB, MB = 1e9, 1e12, 1e6
PAPER_FULL = 1.2 * TB
"""Section 4.2."""
# Brown et al. 2020, arXiv:2005.14165, table 2.1; vocabulary and context as in its section 2.1 and GPT-2's tokenizer.
GPT_3 = {
    "hidden_size": 12288, "ffn_dim": 4 * 12288, "num_hidden_layers": 96, "num_attention_heads": 96, "vocab_size": 50257,
    "max_position_embeddings": 2048, "word_embed_proj_dim": 12288,
}  # fmt: skip
FULL = {
    "weights and Adam's two moments in 16 bit": 2 + 4,
    "the same, and 16-bit gradients": 2 + 2 + 4,
    "mixed precision: 16-bit weights and gradients, 32-bit weights and moments": 2 + 2 + 12,
}
"""Bytes a parameter of full training. The last: Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1."""
LASTING = (terms.BASE, terms.CONSTANTS, terms.VOCABULARY, terms.REST, terms.ADAPTER, terms.GRADIENTS, terms.OPTIMIZER)


@dataclass(frozen=True)
class Counted:
    """What one model's training takes."""

    parameters: int
    trained: int
    plans: dict[str, Peak]
    """The peak of a training step by how the base is stored."""

    @property
    def fewer(self) -> float:
        """Parameters over trained parameters."""
        return self.parameters / self.trained


def models() -> dict[str, PreTrainedConfig]:
    """Return the models by name."""
    return {"GPT-3 175B": CONFIG_MAPPING["opt"](**GPT_3), "LLaMA-7B": known_config("huggyllama/llama-7b")}


def count(config: PreTrainedConfig, rank: int, tokens: int) -> Counted:
    """Return the counts for LoRA of ``rank`` on queries and values, and the plans of a step of one row of ``tokens``."""
    plans = {}
    for bits in (16, 4):
        recipe = recipe_of(rank, tokens, bits)
        peaks = forecast(recipe, BaseShapes(config, "here"), Workload(worst_workload(recipe).train)).peaks()
        plans[f"{bits} bit"] = max(peaks[STEP], peaks[OPTIMIZER_STEP], key=lambda peak: peak.bytes)
    return Counted(*parameters(config, rank), plans)


def parameters(config: PreTrainedConfig, rank: int) -> tuple[int, int]:
    """Return how many numbers the model has, a tensor that is embedding and head once, and how many LoRA of ``rank`` trains."""
    recipe = recipe_of(rank, 2, 16)
    model = recipe.base.empty(config, torch.device("cpu")).requires_grad_(False)
    total = dense_count(model)
    recipe.method.attach(model)
    return total, trainable_count(model)


def dense_count(model: PreTrainedModel) -> int:
    """Return how many numbers ``model`` has that is not adapted yet, in whatever bits; a tensor that is embedding and head once."""
    tied = set(model.all_tied_weights_keys)
    return sum(torch.Size(shape).numel() for name, shape in dense_shapes(model).items() if name not in tied)


def recipe_of(rank: int, tokens: int, bits: int) -> Recipe:
    """Return a recipe of LoRA on queries and values over a base in ``bits``, its optimizer torch's own Adam in float32."""
    tables = {
        "base": {"model": "none", "bits": bits},
        "method": {"rank": rank, "targets": ["q_proj", "v_proj"]},
        "optimizer": {"name": "torch_adamw"},
        "data": {"train": "none"},
        "train": {"steps": 1, "micro_batch": 1, "tokens": tokens},
        "memory": {"checkpointing": "block"},
        "parallel": {"device": "cpu"},
    }
    return build_recipe(tables, "parameter_counts")


def lasting(peak: Peak) -> int:
    """Return what of ``peak`` is there all the time: weights, adapter, gradients, optimizer; not what a row of tokens adds."""
    return sum(peak.terms.get(term, 0) for term in LASTING)


def table(name: str, found: Counted, rank: int, tokens: int) -> str:
    """Return one model's table."""
    lines = [
        f"\n{name}: {found.parameters / 1e9:.2f} B parameters, rank {rank} on queries and values\n",
        "| | full training | LoRA | factor |\n|---|---|---|---|",
        f"| trained parameters | {found.parameters / 1e6:,.0f} M | {found.trained / 1e6:.2f} M | {found.fewer:,.0f} |",
        f"| checkpoint in 16 bit | {2 * found.parameters / GB:,.1f} GB | {2 * found.trained / MB:,.1f} MB | {found.fewer:,.0f} |",
    ]
    kept = {stored: lasting(peak) for stored, peak in found.plans.items()}
    for words, each in FULL.items():
        full = each * found.parameters
        factors = ", ".join(f"{full / size:.1f}" for size in kept.values())
        sizes = ", ".join(f"{size / GB:,.1f} GB ({stored})" for stored, size in kept.items())
        told = f"{full / TB:.2f} TB" if full >= TB else f"{full / GB:.1f} GB"
        lines.append(f"| memory: {words} | {told} | {sizes} | {factors} |")
    rows = ", ".join(f"{(peak.bytes - kept[stored]) / GB:,.1f} GB ({stored})" for stored, peak in found.plans.items())
    lines.append(f"| what a row of {tokens:,} tokens adds, checkpointed by block | not counted | {rows} | |")
    return "\n".join(lines)


def differences(found: Counted) -> str:
    """Return in words where GPT-3's figures at rank 4 differ from the paper's, and why."""
    checkpoint, moments, kept = 2 * found.trained, 6 * found.parameters / TB, lasting(found.plans["16 bit"]) / GB
    lines = (
        "Where these differ from the paper's:",
        f'- "10,000 times" is {found.fewer:,.0f}: {found.parameters / 1e9:.1f} B over {found.trained / 1e6:.2f} M; table 4 there has '
        "175,255.8 M and, at a quarter of the rank, 4.7 M.",
        f'- "35 MB" is {checkpoint / MB:.1f} MB or {checkpoint / 2**20:.1f} MiB in 16 bit.',
        f'- "1.2 TB" is {PAPER_FULL / found.parameters:.1f} bytes a parameter. Weights and both moments in 16 bit, of which LoRA saves '
        f"the two thirds that the paper names, are {moments:.2f} TB; what is over is gradients or activations, which it does not tell.",
        f'- "350 GB" is the weights alone: here {kept:.1f} GB with adapter, gradients and optimizer; what the rows need comes on top.',
        "- With moments in 32 bit, as most train today, full training takes more and the factor is larger; with a base in 4 bit, more so.",
    )
    return "\n" + "\n".join(lines)


def main(argv: list[str]) -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("build/counts"))
    args = parser.parse_args(argv)
    if bad := [f"--{key} {value}: should be 1 or more" for key, value in (("rank", args.rank), ("tokens", args.tokens)) if value < 1]:
        raise RecipeError(bad)
    chosen = {name: config for name, config in models().items() if args.only.lower() in name.lower()}
    if not chosen:
        raise RecipeError(f"--only {args.only}: no model is called so; there are {', '.join(models())}")
    found, texts = {}, []
    for name, config in chosen.items():
        found[name] = count(config, args.rank, args.tokens)
        more = [differences(found[name])] if name.startswith("GPT-3") and args.rank == 4 else []
        texts.append("\n".join([table(name, found[name], args.rank, args.tokens), *more]))
        print(texts[-1], flush=True)
    write_text(args.out / "counts.md", "\n".join(texts) + "\n")
    draw(found, args.rank, args.out / "counts.png")


def draw(found: dict[str, Counted], rank: int, path: Path) -> None:
    """Write a bar for each way of training: what is trained, and the memory that lasts.

    Raises:
        MachineError: there is no matplotlib.
    """
    pyplot = open_pyplot()
    figure, axes = pyplot.subplots(len(found), 2, figsize=(11, 2.6 * len(found)), layout="constrained", squeeze=False)
    for (left, right), (name, each) in zip(axes, found.items(), strict=True):
        bars = {"full training": each.parameters, f"LoRA, rank {rank}": each.trained}
        left.barh(list(bars), list(bars.values()), log=True)
        left.set(xlim=(1e3, 3 * each.parameters), title=f"{name}: trained parameters, {each.fewer:,.0f} times fewer")
        sizes = {f"full: {words.partition(':')[0]}": size * each.parameters for words, size in FULL.items()}
        sizes |= {f"LoRA over {stored} weights": lasting(peak) for stored, peak in each.plans.items()}
        right.barh(list(sizes), [size / GB for size in sizes.values()], color=["tab:blue"] * len(FULL) + ["tab:orange"] * len(each.plans))
        right.set(title="memory that lasts, GB")
        for axis in (left, right):
            axis.invert_yaxis()
            axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    print(path)


if __name__ == "__main__":
    run_verb(main)
