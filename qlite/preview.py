"""Look at a recipe's data before a weight is loaded: formats, lengths, what is left out, what is trained of a row.

python -m qlite.preview recipes/quickstart.toml
python -m qlite.preview my.toml train.tokens=1024 --row 12
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from qlite.calls import called
from qlite.data.check import described, share
from qlite.data.dataset import DataSet, Part
from qlite.data.figures import Spread, histogram, spans, useful_share
from qlite.errors import RecipeError
from qlite.recipe.read import read_recipe, recipe_of
from qlite.recipe.schema import Recipe
from qlite.streams import clean
from qlite.training.notebook import console_for
from qlite.training.shown import Shown
from qlite.verb import let_call, run_verb

BINS, BAR = 12, 40
SHOWN_CHARACTERS = 4000
"""Longest row that is shown whole."""


def main(argv: list[str]) -> None:
    """Run the command line; ends with exit code 2 if ``qlite.train`` would refuse this data."""
    parser = argparse.ArgumentParser(
        prog="python -m qlite.preview", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="a TOML file, for example recipes/quickstart.toml")
    parser.add_argument("overrides", nargs="*", help="table.key=value, put over the recipe")
    parser.add_argument("--row", type=int, default=1, help="training row to show, counted from 1")
    args = parser.parse_intermixed_args(argv)
    found = preview(read_recipe(args.recipe, args.overrides), row=args.row)
    Console(highlight=False, markup=False).print(found)
    found.data.require_sound()


def preview(recipe: Recipe | str | os.PathLike[str], *, row: int = 1, quiet: bool = False) -> "Preview":
    """Return what the data of ``recipe``, a Recipe or the path of a TOML file, looks like; ``row``, from 1, is shown as it is trained.

    Whether ``train`` would refuse it is for the preview's ``data.require_sound()`` to say.

    Raises:
        QliteError: recipe, data or tokenizer cannot be read.
    """
    with called():
        recipe = recipe_of(recipe).with_absolute_paths()
        with console_for(f"qlite preview  {recipe.name}", quiet) as console:
            tokenizer = recipe.base.tokenizer(console.phase)
            recipe.method.resolved(tokenizer)
            data = recipe.data.load(tokenizer, recipe.train.tokens, lambda _: None, console.phase)
        if not 1 <= row <= len(data.train):
            raise RecipeError(f"--row {row}: there are {len(data.train)} training rows")
        return Preview(recipe, data, row)


@dataclass(frozen=True, repr=False)
class Preview(Shown):
    """The rows of a recipe: how many, how long, what is left out, and what is trained of one of them."""

    recipe: Recipe
    data: DataSet
    row: int
    """From 1."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in self.data.parts:
            for line in described(part):
                yield Text(clean(line, 500))
        yield _counts(self.data)
        for part in self.data.parts:
            yield from _lengths(part, self.recipe)
        yield _batches(self.recipe, self.data)
        yield from _row(self.data, self.row - 1, has_colour=console.color_system is not None)


def _counts(data: DataSet) -> Table:
    table = Table(title="rows", title_justify="left")
    for heading in ("", "read", "kept", "trained on", "held out"):
        table.add_column(heading, justify="left" if not heading else "right")
    for number, part in enumerate(data.parts):
        is_train = number == 0
        held = len(data.test) if not is_train or len(data.parts) == 1 else 0
        used = len(data.train) if is_train else 0
        table.add_row(part.key, f"{part.read:,}", f"{len(part.rows):,}", f"{used:,}", f"{held:,}")
    return table


def _lengths(part: Part, recipe: Recipe) -> Iterator[Text]:
    lengths, limit = part.rows.store.length, recipe.train.tokens
    spread, trained = Spread.of(lengths), Spread.of(part.rows.trained_counts)
    yield Text(
        f"\n{part.key}: tokens a row {spread.low} to {spread.high}, half at most {spread.median}, 99 % at most {spread.most}; "
        f"trained tokens {trained.low} to {trained.high}, half at most {trained.median}"
    )
    bins = histogram(lengths, BINS)
    largest = max(count for _, _, count in bins)
    for low, high, count in bins:
        bar = "█" * -(-count * BAR // largest)
        over = "  longer than train.tokens" if low > limit else ""
        yield Text.assemble((f"{low:>7,} - {high:>7,} ", "dim"), (bar, "red" if over else "cyan"), f" {count:,}", (over, "red"))
    long = part.cut.long
    fate = {"drop": "left out", "cut_start": "cut at their start", "cut_end": "cut at their end"}[recipe.data.long_rows]
    told = f"{share(len(long), part.read)} are longer than train.tokens = {limit} and are {fate}: {part.cut.lost_tokens:,} tokens"
    yield Text(told if len(long) else f"nothing is longer than train.tokens = {limit}")


def _batches(recipe: Recipe, data: DataSet) -> Table:
    """Return how full batches are, padded and packed."""
    plan = recipe.train
    table = Table(title="\nbatches", title_justify="left")
    for heading in ("", "steps an epoch", "tokens a step", "of them no padding"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, tokens in (("padded", None), (f"packed into {plan.tokens}", plan.tokens)):
        batches = replace(plan, packing=tokens is not None).batches(data)
        chosen = " (the recipe's)" if (tokens is not None) == plan.packing else ""
        share_useful = useful_share(batches)
        tokens_a_step = data.train.lengths.sum() / batches.steps_per_epoch / share_useful
        table.add_row(name + chosen, f"{batches.steps_per_epoch:,}", f"{tokens_a_step:,.0f}", f"{share_useful:.1%}")
    return table


def _row(data: DataSet, row: int, has_colour: bool) -> Iterator[Text]:
    """Yield a row as the model sees it, its trained tokens green, and in brackets where there is no colour."""
    encoder, text = data.encoder, Text()
    for ids, trained in spans(data.train, row):
        piece = "\n".join(clean(line, SHOWN_CHARACTERS) for line in encoder.tokenizer.decode(ids).split("\n"))
        if trained and not has_colour:
            piece = f"⟦{piece}⟧"
        text.append(piece, "bold green" if trained else "dim")
    if len(text) > SHOWN_CHARACTERS:
        text = Text.assemble(text[:SHOWN_CHARACTERS], ("…", "dim"))
    count = int(np.count_nonzero(data.train[row].trained))
    how = "green" if has_colour else "in brackets"
    yield Text(f"\nrow {row + 1} ({data.train.where(row)}): {count} of {len(data.train[row])} tokens are trained, {how}")
    yield text
    ends = ", ".join(encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids))
    yield Text(f"\nan answer ends at: {ends}")


let_call(__name__, preview)

if __name__ == "__main__":
    run_verb(main)
