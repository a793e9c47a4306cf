"""What an adapter costs when a model answers: merged, beside the base, in series, or several mixed, over 16-, 8- and 4-bit bases.

    python tools/latency.py                                              # a tiny random Llama: whether it works
    python tools/latency.py --recipe recipes/quickstart.toml --rounds 20 # SmolLM2-135M

The question of table 1 in Hu et al. 2021, arXiv:2106.09685. All sides are held at once and take turns, round for round; a figure is the
median of the rounds, and what it is to the base's is the median of each round's ratio, with the lowest and the highest. Each round reads
a prompt of random tokens ("first": until the first new token is chosen) and then decodes with a cache ("token": each one after it).
LoRA's adapters are random and on all linears, what is computed does not depend on their values; bottleneck adapters stand behind each
attention and each MLP (Houlsby), in series with them, which is what that table compares LoRA with.

The second table: the same rows answered by 8 adapters mixed in one batch, by the 8 one after another (swapped in between), and by the base
alone in one batch; new tokens a second in all.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qlite import device
from qlite.formats.swapped import swapped
from qlite.methods.base import select_linears
from qlite.methods.bottleneck import Bottleneck
from qlite.methods.low_rank import LowRank
from qlite.model.load import Base
from qlite.quant.linear import store_weight
from qlite.recipe.read import read_recipe
from qlite.serving.bank import BASE, AdapterBank, linear_shapes
from qlite.verb import run_verb

MIXED = [f"mixed {number}" for number in range(1, 9)]
ALONE = {"LoRA, rank 8": 8, "LoRA, rank 64": 64}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


@dataclass(frozen=True)
class Times:
    """Of one answer."""

    first_seconds: float
    token_seconds: float
    seconds: float


@dataclass(frozen=True)
class Side:
    """One row of the first table: a model that answers, and what is chosen before a batch of so many rows."""

    bits: int
    name: str
    model: PreTrainedModel
    choose: Callable[[int], None] = lambda rows: None


def main(argv: list[str]) -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="take the base of this recipe; without it a tiny random Llama")
    parser.add_argument("--rounds", type=int, default=5, help="after one that does not count")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens after the first")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows")
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 8, 16), default=[16, 8, 4])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    args = parser.parse_args(argv)
    where = device.pick_device(args.device)
    device.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        base = read_recipe(args.recipe).base if args.recipe else _tiny_base(Path(folder))
        print(f"{base.model}, {base.dtype}, {device.describe(where)}; prompt {args.prompt}, {args.rounds} rounds", flush=True)
        banks = {bits: open_bank(replace(base, bits=bits), where) for bits in args.bits}
        sides = [side for bits, bank in banks.items() for side in (*sides_of(bits, bank), bottleneck(replace(base, bits=bits), where))]
        if 16 in banks:
            sides.insert(1, Side(16, "merged", merged_model(replace(base, bits=16), where)))
        for rows in args.batches:
            print_latency(sides, rows, args, where)
        for bits, bank in banks.items():
            print_throughput(bits, bank, args, where)


def open_bank(base: Base, where: torch.device) -> AdapterBank:
    """Load the base, with random adapters for every side beside it."""
    base.compile(where, lambda *_: None)
    bank = AdapterBank(base.load(where, lambda *_: None).model, where)
    for seed, (name, rank) in enumerate({**ALONE, **dict.fromkeys(MIXED, 8)}.items()):
        bank.add(name, random_adapter(bank.model, rank, seed))
    return bank


def random_adapter(model: PreTrainedModel, rank: int, seed: int) -> dict[str, LowRank]:
    """Return random updates of all linears of the blocks, small beside their weights."""
    generator, found = torch.Generator().manual_seed(seed), {}
    inside = {name.removesuffix(".base") for name in select_linears(model, "all-linear")}
    for layer, (rows, columns) in linear_shapes(model).items():
        if layer in inside:
            A, B = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
            found[layer] = LowRank(A / columns**0.5, B * 0.01, 2.0)
    return found


def merged_model(base: Base, where: torch.device) -> PreTrainedModel:
    """Return the 16-bit base with the adapter of rank 8 merged into its weights."""
    model = base.load(where, lambda *_: None).model
    for layer, update in random_adapter(model, 8, 0).items():
        linear = model.get_submodule(layer)
        store_weight(linear, swapped(linear.weight.cpu(), None, update).to(where))
    return model


def bottleneck(base: Base, where: torch.device) -> "Side":
    """Return the side of a base with bottleneck adapters of width 64."""
    model = base.load(where, lambda *_: None).model
    Bottleneck(width=64).attach(model)
    return Side(base.bits, "bottleneck, width 64", model.eval())


def sides_of(bits: int, bank: AdapterBank) -> Iterator[Side]:
    """Yield what is measured over one base; its own row first."""
    for name in (BASE, *ALONE):
        yield Side(bits, name, bank.model, lambda rows, name=name: bank.use(name))
    yield Side(bits, "8 LoRA mixed, rank 8", bank.model, lambda rows: bank.use([MIXED[row % 8] for row in range(rows)]))


@torch.no_grad()
def answer(model: PreTrainedModel, ids: Tensor, tokens: int) -> Times:
    """Return the times of a greedy answer of 1 + ``tokens`` tokens to each row of ids [rows, T]."""
    cache, start = DynamicCache(config=model.config), time.perf_counter()
    new = _next(model, ids, cache)
    new.cpu()  # waits for the card
    first = time.perf_counter()
    for _ in range(tokens):
        new = _next(model, new, cache)
    new.cpu()
    end = time.perf_counter()
    return Times(first - start, (end - first) / tokens, end - start)


def _next(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(dim=-1, keepdim=True)


def print_latency(sides: list[Side], rows: int, args: argparse.Namespace, where: torch.device) -> None:
    """Measure all ``sides`` on a batch of ``rows`` in turns and print their table; several adapters need several rows."""
    sides = [side for side in sides if rows >= 8 or "mixed" not in side.name]
    ids = random_ids(sides[0].model, rows, args.prompt, where)
    found: dict[tuple[int, str], list[Times]] = {(side.bits, side.name): [] for side in sides}
    for _ in range(args.rounds + 1):
        for side in sides:
            side.choose(rows)
            found[side.bits, side.name].append(answer(side.model, ids, args.tokens))
    print(f"\nbatch of {rows}\n{'bits':>4}  {'':22}{'first, ms':>10}  {'to the base':22}{'token, ms':>10}  to the base")
    for (bits, name), times in found.items():
        cells = [cell(times[1:], found[bits, BASE][1:], kind) for kind in ("first_seconds", "token_seconds")]
        print(f"{bits:4}  {name:22}{cells[0]:34}{cells[1]}", flush=True)


def cell(times: list[Times], base: list[Times], kind: str) -> str:
    """Return the median in milliseconds, and to the base's in the same rounds: median (lowest to highest)."""
    own, ratios = [getattr(each, kind) for each in times], [getattr(a, kind) / getattr(b, kind) for a, b in zip(times, base, strict=True)]
    return f"{statistics.median(own) * 1000:10.2f}  {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def print_throughput(bits: int, bank: AdapterBank, args: argparse.Namespace, where: torch.device) -> None:
    """Measure 8 rows: by 8 adapters in one batch, by them one after another, and by the base in one batch; in turns."""
    ids = random_ids(bank.model, len(MIXED), args.prompt, where)

    def together(names: list[str] | str) -> float:
        bank.use(names)
        return answer(bank.model, ids, args.tokens).seconds

    def in_turn() -> float:
        total = 0.0
        for row, name in enumerate(MIXED):
            bank.use(name)
            total += answer(bank.model, ids[row : row + 1], args.tokens).seconds
        return total

    ways = {"8 adapters mixed": lambda: together(MIXED), "one after another": in_turn, "no adapter": lambda: together(BASE)}
    seconds = {name: [] for name in ways}
    for _ in range(args.rounds + 1):
        for name, way in ways.items():
            seconds[name].append(way())
    count = len(MIXED) * (1 + args.tokens)
    print(f"\n8 rows over {bits} bit, new tokens a second")
    for name, own in seconds.items():
        ratios = [mixed / each for mixed, each in zip(seconds["8 adapters mixed"][1:], own[1:], strict=True)]
        speed = count / statistics.median(own[1:])
        print(
            f"      {name:22}{speed:10.1f}  {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of the mixed batch's"
        )


def random_ids(model: PreTrainedModel, rows: int, tokens: int, where: torch.device) -> Tensor:
    """Return prompts of random tokens."""
    return torch.randint(0, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(where)


def _tiny_base(folder: Path) -> Base:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    return Base(model=str(folder), dtype="float32", cache=False)


if __name__ == "__main__":
    run_verb(main)
