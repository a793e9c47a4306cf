"""Will it fit? What a recipe needs of a card's memory, traced through its own code before a weight is read.

python -m qlite.plan recipes/llama8b_8gb.toml --gpu "RTX 4060"
python -m qlite.plan my.toml train.tokens=4096 --vram 12GiB
python -m qlite.plan my.toml --vram 8GiB --fit
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from qlite import device
from qlite.calls import called
from qlite.errors import MachineError, RecipeError
from qlite.memory import terms
from qlite.memory.cards import CARDS, Card, find_card
from qlite.memory.ledger import Peak
from qlite.memory.plan import VISIBLE_SHARE, MemoryPlan
from qlite.model.shapes import BaseShapes, base_shapes
from qlite.recipe.read import read_recipe, recipe_of
from qlite.recipe.schema import Recipe
from qlite.streams import clean
from qlite.training.automatic import settled
from qlite.training.budget import fit_words
from qlite.training.fit import fit as fit_to
from qlite.training.forecast import Forecast, worst_workload
from qlite.training.gauges import COLOURS, LETTERS
from qlite.training.kept_plans import kept_forecast
from qlite.training.notebook import console_for
from qlite.training.report import Observer
from qlite.training.shown import Shown
from qlite.training.ways_out import WayOut, ways_out
from qlite.units import GIB, KIB, MIB, format_bytes, format_step_seconds, parse_bytes
from qlite.verb import let_call, run_verb

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
    found = plan(read_recipe(args.recipe, args.overrides), gpu=args.gpu, vram=args.vram, fit=args.fit)
    Console(highlight=False, markup=False).print(found, crop=False)
    if not found.fits:
        raise MachineError(f"does not fit: {found.memory}")


def plan(
    recipe: Recipe | str | os.PathLike[str], *, gpu: str | None = None, vram: str | None = None, fit: bool = False, quiet: bool = False
) -> "Plan":
    """Return what ``recipe``, a Recipe or the path of a TOML file, needs of memory, and whether it fits; nothing is raised if it does not.

    gpu, vram: the card to plan for, "RTX 3060", or its memory, "12GiB"; else memory.budget, the card that is here, or none.
    fit: choose micro-batch and memory keys for that much memory, the fastest that fit; they are in the plan's ``recipe``.
    quiet: show no progress.

    Raises:
        QliteError: recipe or base do not allow it, there is no such card, or nothing fits (``fit``).
    """
    with called():
        recipe = recipe_of(recipe)
        if gpu is not None and vram is not None:
            raise RecipeError("--gpu and --vram: both say what to plan for; give one")
        target = target_of(vram, gpu, recipe.memory.budget)
        if fit and target.capacity is None:
            raise RecipeError('--fit: for how much memory? Give --vram 8GiB or --gpu "RTX 3060"')
        with console_for(f"qlite plan  {recipe.name}", quiet, sys.stderr) as screen:
            return _plan(recipe, target, fit, screen)


def _plan(recipe: Recipe, target: Target, is_fitted: bool, screen: Observer) -> "Plan":
    shapes = base_shapes(recipe.base, screen.phase)
    fitted = fit_to(recipe, shapes, target.plan, target.card, partial(screen.phase, "try what fits")) if is_fitted else None
    chosen = fitted.recipe if fitted else _settled(recipe, shapes, target)
    found = fitted.found if fitted else kept_forecast(chosen, shapes, worst_workload(chosen))
    memory = target.plan(found)
    told = partial(screen.phase, "trace what could be changed")
    ways = [] if memory.fits else ways_out(chosen, shapes, memory.peak.bytes, worst_workload, told=told)
    return Plan(chosen, memory, tuple(ways), tuple(fit_words(recipe, fitted)) if fitted else (), found, target, shapes.origin)


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


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What a recipe needs of a card's memory, phase by phase and term by term; sizes are in bytes."""

    recipe: Recipe
    """As it would run: with what "auto" or ``fit`` has chosen."""
    memory: MemoryPlan
    ways_out: tuple[WayOut, ...]
    """Where it does not fit: each change with the peak that it would leave."""
    chosen: tuple[str, ...]
    """What ``fit`` has chosen, and why nothing faster, in words."""
    forecast: Forecast
    target: Target
    origin: str
    """Where the shapes of the base are from."""

    @property
    def fits(self) -> bool:
        """Whether the card holds it; true where none is named."""
        return self.memory.fits

    @property
    def peak_bytes(self) -> int:
        """The most that tensors take."""
        return self.memory.peak.bytes

    @property
    def terms(self) -> dict[str, int]:
        """What they are at that moment: "base weights", "adapter", "saved for backward" ..."""
        return dict(self.memory.peak.terms)

    @property
    def needed_bytes(self) -> int:
        """What the card must have: the tensors, CUDA's own and gaps."""
        return self.memory.needed

    @property
    def capacity_bytes(self) -> int | None:
        """What the card has for programs; None: none is named."""
        return self.memory.capacity

    @property
    def step_seconds(self) -> dict[str, float]:
        """The estimated time of an optimizer step, by card: from peak rates, not measured."""
        return {card.name: self.forecast.work.seconds(card) * self.recipe.train.accumulation for card in self._cards()}

    def _cards(self) -> list[Card]:
        return [self.target.card] if self.target.card else [CARDS[name] for name in REFERENCE_CARDS]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield what is planned, bytes by term and phase, a bar for each phase, the verdict, and how long it may take."""
        memory, recipe = self.memory, self.recipe
        yield from _head(recipe, self.origin)
        yield _table(memory)
        for phase, peak in memory.phases.items():
            yield _bar(phase, peak, memory)
        yield Text("  ".join(f"{LETTERS[term]} {term}".replace(" ", "\N{NO-BREAK SPACE}") for term in _terms(memory)), "dim")
        yield Text(f"\npeak       {_peak_words(memory)}")
        yield Text(f"on a card  {format_bytes(memory.needed)}, with {format_bytes(memory.outside)} for CUDA and gaps (assumed)")
        if memory.host:
            yield Text(f"on host    {format_bytes(memory.host)} of offloaded tensors")
        yield _verdict(memory)
        if self.target.card and not self.target.card.has_bf16:
            yield Text(f"but        {self.target.card.name} has no bfloat16: attention's T x T scores come on top")
        yield Text(_time(self.forecast, recipe, self._cards()), "dim")
        if self.chosen:  # not wrapped: there is a line to be copied
            yield Text("\n" + "\n".join(self.chosen), no_wrap=True, overflow="ignore")
        if self.ways_out:
            yield Text("\nwhat to change (each alone; --fit chooses a combination):")
            for way in self.ways_out:
                yield Text(f"  {'fits' if memory.room_for(way.peak) else '    '}  {way}")


def _head(recipe: Recipe, origin: str) -> Iterator[Text]:
    """Yield what is planned."""
    train = recipe.train
    kind = f"{recipe.base.bits} bit" + (f" ({recipe.base.quant_type})" if recipe.base.bits == 4 else "")
    line = f"{train.micro_batch} x {train.tokens} tokens{' packed' if train.packing else ''}"
    yield Text(clean(f"{recipe.base.model}, {kind}, {recipe.method.words}"))
    kept = recipe.memory.checkpointing if recipe.memory.checkpointing != "auto" else "auto (no card is named: as block)"
    yield Text(f"{line} a micro-batch, all rows as long as train.tokens: the most there can be; checkpointing {kept}", "dim")
    yield Text(f"shapes from {origin}\n", "dim")


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


let_call(__name__, plan)

if __name__ == "__main__":
    run_verb(main)
