"""Will it fit? What a recipe needs of a card's memory, traced through its own code before a weight is read.

python -m qlite.plan recipes/llama8b_8gb.toml --gpu "RTX 4060"
python -m qlite.plan my.toml train.tokens=4096 --vram 12GiB
python -m qlite.plan my.toml --vram 8GiB --fit
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlite import device
from qlite.errors import MachineError, RecipeError
from qlite.memory import terms
from qlite.memory.cards import CARDS, Card, find_card
from qlite.memory.ledger import Peak
from qlite.memory.plan import VISIBLE_SHARE, MemoryPlan
from qlite.model.shapes import BaseShapes, base_shapes
from qlite.recipe.read import read_recipe
from qlite.recipe.schema import Recipe
from qlite.streams import clean
from qlite.training.automatic import settled
from qlite.training.budget import fit_words
from qlite.training.console import open_console
from qlite.training.fit import fit
from qlite.training.forecast import Forecast, worst_workload
from qlite.training.gauges import COLOURS, LETTERS
from qlite.training.kept_plans import kept_forecast
from qlite.training.ways_out import WayOut, ways_out
from qlite.units import GIB, KIB, MIB, format_bytes, format_step_seconds, parse_bytes
from qlite.verb import run_verb

USUAL_CARDS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 80)
"""GiB."""
REFERENCE_CARDS = ("RTX 3060", "RTX 4070", "RTX 4090")
"""Whose time is estimated where no card is named."""
COMFORT = 0.05
"""Share of a card that a plan should leave free."""
BAR = 44
SMALL_SHARE = 0.001
"""Of the peak: smaller terms are not shown."""


@dataclass(frozen=True)
class Target:
    """The card to plan for, as far as it is known."""

    words: str
    capacity: int | None
    card: Card | None

    def plan(self, found: Forecast) -> MemoryPlan:
        """Return ``found`` against this card."""
        return MemoryPlan.on_card(found.peaks(), self.capacity, self.words, found.int8_bytes)


def main(argv: list[str]) -> None:
    """Run the command line; ends with exit code 3 if the recipe does not fit the card or budget that is named."""
    parser = argparse.ArgumentParser(prog="python -m qlite.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a TOML file, for example recipes/llama8b_8gb.toml")
    parser.add_argument("overrides", nargs="*", help="table.key=value, put over the recipe")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--vram", help="memory of the card to plan for, for example 12GiB")
    where.add_argument("--gpu", help='the card to plan for, for example "RTX 3060"')
    parser.add_argument("--fit", action="store_true", help="choose micro-batch and memory keys for that much memory: the fastest that fit")
    args = parser.parse_intermixed_args(argv)
    recipe = read_recipe(args.recipe, args.overrides)
    target = target_of(args.vram, args.gpu, recipe.memory.budget)
    if args.fit and target.capacity is None:
        raise RecipeError('--fit: for how much memory? Give --vram 8GiB or --gpu "RTX 3060"')
    console, fitted = Console(highlight=False, markup=False), None
    with open_console(f"qlite plan  {args.recipe.stem}", sys.stderr) as screen:
        shapes = base_shapes(recipe.base, screen.phase)
        if args.fit:
            fitted = fit(recipe, shapes, target.plan, target.card, partial(screen.phase, "try what fits"))
        chosen = fitted.recipe if fitted else _settled(recipe, shapes, target)
        found = fitted.found if fitted else kept_forecast(chosen, shapes, worst_workload(chosen))
        plan = target.plan(found)
        told = partial(screen.phase, "trace what could be changed")
        ways = [] if plan.fits else ways_out(chosen, shapes, plan.peak.bytes, worst_workload, told=told)
    show(chosen, shapes, found, target, console)
    if fitted:
        console.print(Text("\n" + "\n".join(fit_words(recipe, fitted))), soft_wrap=True)
    if ways:
        show_ways_out(ways, plan, console)
    if not plan.fits:
        raise MachineError(f"does not fit: {plan}")


def _settled(recipe: Recipe, shapes: BaseShapes, target: Target) -> Recipe:
    """Return ``recipe`` as it would run on ``target``; where no card is known, as it needs least."""
    if target.capacity is None:
        return recipe
    return settled(recipe, lambda changed: target.plan(kept_forecast(changed, shapes, worst_workload(changed))))


def target_of(vram: str | None, gpu: str | None, budget: str | None) -> Target:
    """Return what is planned for: the memory or the card that is named, else the recipe's budget, else the card that is here, else none.

    Raises:
        RecipeError: ``vram`` is no amount of memory, or ``gpu`` no known card.
    """
    if vram is not None:
        try:
            size = parse_bytes(vram)
        except RecipeError as error:
            raise RecipeError(f"--vram: {error}") from None
        return Target(f"a card of {format_bytes(size)}", size, None)
    if gpu is not None:
        card = find_card(gpu)
        visible = int(VISIBLE_SHARE * card.vram_bytes)
        return Target(f"{card.name} ({format_bytes(visible)} of its {format_bytes(card.vram_bytes)} for programs)", visible, card)
    if budget is not None:
        return Target(f"memory.budget = {budget}", parse_bytes(budget), None)
    here = device.pick_device("auto")
    if here.type == "cuda":
        return Target(device.describe(here), device.total_memory(here), None)
    return Target("no card", None, None)


def show(recipe: Recipe, shapes: BaseShapes, found: Forecast, target: Target, console: Console) -> None:
    """Print the plan: what is planned, bytes by term and phase, a bar for each phase, the verdict, and how long it may take."""
    plan, train = target.plan(found), recipe.train
    kind = f"{recipe.base.bits} bit" + (f" ({recipe.base.quant_type})" if recipe.base.bits == 4 else "")
    line = f"{train.micro_batch} x {train.tokens} tokens{' packed' if train.packing else ''}"
    console.print(Text(clean(f"{recipe.base.model}, {kind}, {recipe.method.name}")))
    kept = recipe.memory.checkpointing if recipe.memory.checkpointing != "auto" else "auto (no card is named: as block)"
    console.print(Text(f"{line} a micro-batch, all rows as long as train.tokens: the most there can be; checkpointing {kept}", "dim"))
    console.print(Text(f"shapes from {shapes.origin}\n", "dim"))
    console.print(_table(plan))
    for phase, peak in plan.phases.items():
        console.print(_bar(phase, peak, plan))
    console.print(Text("  ".join(f"{LETTERS[term]} {term}".replace(" ", "\N{NO-BREAK SPACE}") for term in _terms(plan)), "dim"))
    console.print()
    console.print(Text(f"peak       {_peak_words(plan)}"))
    console.print(Text(f"on a card  {format_bytes(plan.needed)}, with {format_bytes(plan.outside)} for CUDA and gaps (assumed)"))
    if plan.host:
        console.print(Text(f"on host    {format_bytes(plan.host)} of offloaded tensors"))
    console.print(_verdict(plan))
    if target.card and not target.card.has_bf16:
        console.print(Text(f"but        {target.card.name} has no bfloat16: attention's T x T scores come on top"))
    cards = [target.card] if target.card else [CARDS[name] for name in REFERENCE_CARDS]
    console.print(Text(_time(found, recipe, cards), "dim"))


def show_ways_out(ways: list[WayOut], plan: MemoryPlan, console: Console) -> None:
    """Print each change with its peak, and whether it is enough alone."""
    console.print(Text("\nwhat to change (each alone; --fit chooses a combination):"))
    for way in ways:
        enough = plan.room_for(way.peak)
        console.print(Text(f"  {'fits' if enough else '    '}  {way}"))


def _terms(plan: MemoryPlan) -> list[str]:
    told = {term for peak in plan.phases.values() for term, size in peak.terms.items() if size >= SMALL_SHARE * plan.peak.bytes}
    return [term for term in terms.ALL if term in told]


def _table(plan: MemoryPlan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    unit, name = (MIB, "MiB") if plan.peak.bytes >= 64 * MIB else (KIB, "KiB")
    table.add_column(name)
    for phase in plan.phases:
        table.add_column(phase, justify="right")
    for term in _terms(plan):
        table.add_row(term, *(f"{peak.terms.get(term, 0) / unit:,.0f}" for peak in plan.phases.values()))
    table.add_row("all tensors", *(f"{peak.bytes / unit:,.0f}" for peak in plan.phases.values()), style="bold")
    return table


def _bar(phase: str, peak: Peak, plan: MemoryPlan) -> Text:
    """Return one phase as a bar of its terms; the card's end is a line."""
    full = max(plan.capacity or 0, plan.needed)
    bar, drawn, size = Text(f"{phase:<11}"), 0, 0
    for term, colour in COLOURS.items():
        size += peak.terms.get(term, 0)
        end = round(BAR * size / full)
        bar.append(LETTERS[term] * (end - drawn), colour)
        drawn = max(drawn, end)
    end = round(BAR * plan.needed_for(size) / full)
    bar.append("·" * (end - drawn), "dim")
    if plan.capacity is not None:
        edge = round(BAR * plan.capacity / full)
        bar.append(" " * (edge - end) + "│" if edge >= end else "  over", "dim")
    return bar.append(f" {format_bytes(plan.needed_for(peak.bytes))}")


def _peak_words(plan: MemoryPlan) -> str:
    where = f" ({plan.peak.where})" if plan.peak.where else ""
    return f"{format_bytes(plan.peak.bytes)} of tensors, in {plan.phase}{where}"


def _verdict(plan: MemoryPlan) -> Text:
    if plan.capacity is None:
        smallest = next((size for size in USUAL_CARDS if plan.needed <= (1 - COMFORT) * size * GIB), None)
        words = f"the smallest usual card with 5 % to spare: {smallest} GB" if smallest else "no usual card holds it"
        return Text(f"verdict    {words}", "bold")
    share = abs(plan.headroom) / plan.capacity
    if plan.fits:
        words = f"verdict    fits {plan.device}: {format_bytes(plan.headroom)} ({share:.0%}) to spare"
        # What other programs take of a card, and what its allocator cannot use, is in no plan.
        return Text(words, "bold green") if share >= COMFORT else Text(f"{words}, which is little", "bold yellow")
    return Text(f"verdict    does not fit {plan.device}: {format_bytes(-plan.headroom)} ({share:.0%}) too much", "bold red")


def _time(found: Forecast, recipe: Recipe, cards: list[Card]) -> str:
    train = recipe.train
    tokens = train.micro_batch * train.tokens
    told = []
    for card in cards:
        seconds = found.work.seconds(card)
        told.append(f"{card.name} {format_step_seconds(seconds * train.accumulation)} a step, {tokens / seconds:,.0f} tokens/s")
    counted = f"{found.work.flops / 1e12:,.1f} TFLOP and {format_bytes(found.work.bytes)} moved a micro-batch"
    return "\n".join([f"time       estimated from peak rates, not measured ({counted}):", *(f"           {line}" for line in told)])


if __name__ == "__main__":
    run_verb(main)
