"""Look at a recipe's data before a weight is loaded: formats, lengths, what is left out, what is trained of a row.

python -m qlite.preview recipes/quickstart.toml
python -m qlite.preview my.toml train.tokens=1024 --row 12
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlite.data.check import described, share
from qlite.data.dataset import DataSet, Part
from qlite.data.figures import Spread, histogram, spans, useful_share
from qlite.errors import RecipeError
from qlite.recipe.read import read_recipe
from qlite.recipe.schema import Recipe
from qlite.streams import clean
from qlite.training.console import open_console
from qlite.verb import run_verb

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
    recipe = read_recipe(args.recipe, args.overrides).with_absolute_paths()
    with open_console(f"qlite preview  {args.recipe.stem}") as console:
        tokenizer = recipe.base.tokenizer(console.phase)
        recipe.method.resolved(tokenizer)
        data = recipe.data.load(tokenizer, recipe.train.tokens, lambda _: None, console.phase)
    if not 1 <= args.row <= len(data.train):
        raise RecipeError(f"--row {args.row}: there are {len(data.train)} training rows")
    show(recipe, data, args.row - 1, Console(highlight=False, markup=False))
    data.require_sound()


def show(recipe: Recipe, data: DataSet, row: int, console: Console) -> None:
    """Print all there is to see."""
    for part in data.parts:
        for line in described(part):
            console.print(Text(clean(line, 500)))
    console.print(_counts(data))
    for part in data.parts:
        _show_lengths(part, recipe, console)
    console.print(_batches(recipe, data))
    _show_row(data, row, console)


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


def _show_lengths(part: Part, recipe: Recipe, console: Console) -> None:
    lengths, limit = part.rows.store.length, recipe.train.tokens
    spread, trained = Spread.of(lengths), Spread.of(part.rows.trained_counts)
    console.print(
        f"\n{part.key}: tokens a row {spread.low} to {spread.high}, half at most {spread.median}, 99 % at most {spread.most}; "
        f"trained tokens {trained.low} to {trained.high}, half at most {trained.median}"
    )
    bins = histogram(lengths, BINS)
    largest = max(count for _, _, count in bins)
    for low, high, count in bins:
        bar = "█" * -(-count * BAR // largest)
        over = "  longer than train.tokens" if low > limit else ""
        console.print(Text.assemble((f"{low:>7,} - {high:>7,} ", "dim"), (bar, "red" if over else "cyan"), f" {count:,}", (over, "red")))
    long = part.cut.long
    fate = {"drop": "left out", "cut_start": "cut at their start", "cut_end": "cut at their end"}[recipe.data.long_rows]
    told = f"{share(len(long), part.read)} are longer than train.tokens = {limit} and are {fate}: {part.cut.lost_tokens:,} tokens"
    console.print(told if len(long) else f"nothing is longer than train.tokens = {limit}")


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


def _show_row(data: DataSet, row: int, console: Console) -> None:
    """Print a row as the model sees it, its trained tokens green, and in brackets where there is no colour."""
    encoder, has_colour = data.encoder, console.color_system is not None
    text = Text()
    for ids, trained in spans(data.train, row):
        piece = "\n".join(clean(line, SHOWN_CHARACTERS) for line in encoder.tokenizer.decode(ids).split("\n"))
        if trained and not has_colour:
            piece = f"⟦{piece}⟧"
        text.append(piece, "bold green" if trained else "dim")
    if len(text) > SHOWN_CHARACTERS:
        text = Text.assemble(text[:SHOWN_CHARACTERS], ("…", "dim"))
    count = int(np.count_nonzero(data.train[row].trained))
    how = "green" if has_colour else "in brackets"
    console.print(f"\nrow {row + 1} ({data.train.where(row)}): {count} of {len(data.train[row])} tokens are trained, {how}")
    console.print(text, soft_wrap=False)
    ends = ", ".join(encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids))
    console.print(Text(f"\nan answer ends at: {ends}"))


if __name__ == "__main__":
    run_verb(main)
