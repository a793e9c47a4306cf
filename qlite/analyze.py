"""Look into a trained adapter: how much rank it uses, how alike two are, how much they amplify the base, and what rank to use next time.

python -m qlite.analyze                                   the newest finished run
python -m qlite.analyze runs/mine                         this one, or a folder in PEFT's format
python -m qlite.analyze runs/r8 runs/r64                  two of one base: other ranks, other seeds, other rows
python -m qlite.analyze runs/mine --base                  over the base's own weights, one linear at a time
python -m qlite.analyze runs/mine --out study             tables as CSV and JSON, and analysis.html to look at

The adapter's files are enough, but for --base; no card is needed. Sources: Hu et al. 2021, arXiv:2106.09685, sections 7.2 and 7.3; Roy and
Vetterli 2007 for the effective rank.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from qlite.analysis.findings import NEARLY_ALL, Findings, amplify, average, compare, study
from qlite.analysis.page import page
from qlite.analysis.similarity import by_chance
from qlite.analysis.spectrum import SHARE
from qlite.analysis.tables import as_csv
from qlite.calls import called
from qlite.errors import AdapterError, RecipeError, RunError, some_of
from qlite.files import new_folder, write_json, write_text
from qlite.formats.peft import CONFIG
from qlite.methods.adalora import AdaLoRA
from qlite.methods.lora import LoRA
from qlite.methods.low_rank import LowRank
from qlite.methods.relora import ReLoRA
from qlite.model.load import Base
from qlite.model.originals import original_weights
from qlite.model.wheel import Progress
from qlite.quant.dense import matrix_shape
from qlite.streams import clean
from qlite.training.adapter_folders import BASE_KEYS, Given, contradictions, run_at
from qlite.training.notebook import console_for
from qlite.training.provenance import require_same_base
from qlite.training.run_folder import find_run
from qlite.training.shown import Shown
from qlite.verb import let_call, run_verb

PAGE, RECORD = "analysis.html", "analysis.json"
RANKS = (
    f"eff. rank: exp of the entropy of the singular values, the mean; for {SHARE:.0%}: the rank that holds so much of ‖ΔW‖² in each "
    "of them; share: of the whole adapter's ‖ΔW‖²"
)
OVERLAPS = (
    "φ: the share of the smaller of two subspaces that lies in the larger, of the strongest directions of A and of all; in, out: φ of the "
    f"directions of input and output that hold {SHARE:.0%} of each ‖ΔW‖²; cosine: of the two ΔW. 1: the same"
)
AMPLIFIED = (
    "factor: ‖ΔW‖ over ‖UᵀWV‖, how much stronger the update makes what the base does in the update's directions U and V. Beside it what it "
    "would be in W's own strongest directions and in random ones: near the latter, the update does what the base did not do at all"
)


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qlite.analyze", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", nargs="?", help="a finished run or a folder in PEFT's format; by default the newest finished run")
    parser.add_argument("other", nargs="?", help="another adapter of the same base, to compare it with")
    parser.add_argument("--base", action="store_true", help="measure the amplification of the base's weights, which are read for it")
    parser.add_argument("--model", help="with --base: where they are, if not where the adapter says")
    parser.add_argument("--out", type=Path, help="folder to write tables and page into")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    args = parser.parse_args(argv)
    options = {"base": args.base, "model": args.model, "out": args.out, "force": args.force}
    Console(highlight=False, markup=False).print(analyze(args.adapter, args.other, **options), crop=False)


def analyze(
    adapter: str | os.PathLike[str] | None = None,
    other: str | os.PathLike[str] | None = None,
    *,
    base: bool = False,
    model: str | None = None,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    quiet: bool = False,
) -> "Analysis":
    """Return what is to be seen in an adapter, and beside ``other``, if that is given; it shows itself.

    adapter, other: what ``train`` has returned, a run folder, or a folder in PEFT's format; by default the newest finished run.
    base: measure also how much the adapter amplifies the base's weights, read from the base's files one at a time; ``model`` says where
        these are, if not where the adapter does.
    out: a folder to write it into as well: CSV, analysis.json and analysis.html; ``force`` replaces one that is there.
    quiet: show no progress.

    Raises:
        QliteError: there is no such adapter, it is no update B A of linears, two are of other shapes, the base is not the one it was
            trained over, or the folder exists.
    """
    with called():
        folder = None if out is None else Path(out)
        if model is not None and not base:
            raise RecipeError(f"--model {model}: says where the base is that --base reads; add --base, or leave it out")
        if folder is not None and folder.exists() and not force:
            raise RunError(f'"{folder}" exists already; choose another --out, or replace it with --force')
        first = _given(adapter)
        second = None if other is None else _given(other)
        with console_for(f"qlite analyze  {first.path}", quiet, sys.stderr) as screen:
            found = _found(first, second, screen.phase)
            if base:
                updates, _ = _updates(first)
                weight = _weights_under(first, updates, model, screen.phase)
                found = replace(found, amplified=amplify(updates, weight, partial(screen.phase, "amplification")))
        if folder is not None:
            _write(folder, found)
        return Analysis(found, folder)


def _given(adapter: str | os.PathLike[str] | None) -> Given:
    path = find_run(None).path if adapter is None else Path(adapter)
    return Given(str(path), path, run_at(path))


def _found(first: Given, second: Given | None, phase: Progress) -> Findings:
    """Return what the files of one adapter say, and of both together."""
    updates, notes = _updates(first)
    if second is None:
        return _studied(first, updates, phase, notes)
    others, more = _updates(second)
    _require_alike(first, second, updates, others)
    notes += [f"{line}; what they share may be of the base's, not of theirs" for line in contradictions([first, second], BASE_KEYS)]
    notes += _same_seed(first, second)
    alone = [name for name in {**updates, **others} if not (name in updates and name in others)]
    if alone:
        notes.append(f"only one of the two changes {some_of(alone, 3)}: not compared")
    found = _studied(first, updates, phase, [*notes, *more])
    return replace(found, other=second.name, overlaps=compare(updates, others, partial(phase, "compare")))


def _studied(given: Given, updates: dict[str, LowRank], phase: Progress, notes: list[str]) -> Findings:
    found = study(given.name, updates, partial(phase, "spectra"), given.base_name, notes)
    return replace(found, no_rank=_why_no_rank(given))


def _why_no_rank(given: Given) -> str:
    """Return why no rank can be advised; empty where one can."""
    if _doubling_inits(given):
        return "No rank is advised: the update is of twice the rank that was trained, and says nothing of the rank that is needed"
    for method in given.run.recipe().method.each if given.run is not None else ():
        if isinstance(method, AdaLoRA):
            return "No rank is advised: AdaLoRA has dealt its ranks out by itself, and triplets that it has masked count in none"
        if isinstance(method, ReLoRA):
            return f"No rank is advised: the update is the sum of several of rank {method.rank}, and says nothing of the rank of one"
    return ""


def _doubling_inits(given: Given) -> list[str]:
    """Return the first values with which an adapter's update is told in twice its rank: what is there, less what it began as."""
    methods = given.run.recipe().method.each if given.run is not None else ()
    return [method.init for method in methods if isinstance(method, LoRA) and method.init != "zero"]


def _same_seed(first: Given, second: Given) -> list[str]:
    """Return what is to be said where two runs drew the same first values of A: that alone makes their A alike."""
    if first.run is None or second.run is None or type(first.run.recipe().method) is not type(second.run.recipe().method):
        return []
    seeds = [given.run.recipe().train.seed for given in (first, second)]
    told = (
        f"both runs began with train.seed = {seeds[0]}, so their A were alike before a step was taken, and φ of A says little of the rows"
    )
    return [f"{told}; train one with another seed to compare"] if seeds[0] == seeds[1] else []


def _updates(given: Given) -> tuple[dict[str, LowRank], list[str]]:
    """Return what an adapter does to each linear, and what else it does, in words.

    Raises:
        AdapterError: it is no LoRA, or changes no linear.
    """
    if given.run is not None and not (given.folder / CONFIG).is_file():
        words = given.run.recipe().method.words
        raise AdapterError(f'{given.path}: was trained with method.name = "{words}", and only updates W + s B A can be looked into so far')
    held = given.adapter
    more = {"layers that are trained whole": held.whole, "rows of tokens": held.rows, "updates of embeddings": held.embeddings}
    notes = [f"{given.name}: {what} ({some_of(list(layers), 3)}) are left out" for what, layers in more.items() if layers]
    updates = replace(held, whole={}, rows={}, embeddings={}).updates(given.folder)
    if any(update.lengths is not None for update in updates.values()):
        notes.append(f"{given.name}: is DoRA; these figures are of s B A alone, without the lengths that it gives to rows")
    for init in _doubling_inits(given):
        begun = f'{given.name}: began as a part of the weights (method.init = "{init}"), so its update is what it is now less what it was'
        notes.append(f"{begun}, a pair of twice the rank that was trained")
    return updates, notes


def _require_alike(first: Given, second: Given, updates: dict[str, LowRank], others: dict[str, LowRank]) -> None:
    """Raise AdapterError where two adapters have nothing to compare, or are not of one base."""
    both = [name for name in updates if name in others]
    if not both:
        raise AdapterError(f"{first.name} and {second.name} change no linear in common: {_some(updates)}; and {_some(others)}")
    shapes = {name: (list(updates[name].shape), list(others[name].shape)) for name in both}
    unlike = [f"{name} is {one} and {another}" for name, (one, another) in shapes.items() if one != another]
    if unlike:
        raise AdapterError(f"{first.name} and {second.name} are not of one base: {some_of(unlike, 3)}")


def _some(updates: dict[str, LowRank]) -> str:
    return some_of(list(updates), 2)


def _weights_under(given: Given, updates: dict[str, LowRank], model: str | None, phase: Progress) -> Callable[[str], Tensor]:
    """Return what gives the base's own weight [out, in] of a linear, read when it is asked for.

    Raises:
        QliteError: the base is not there, not the one of training, or has no such linears.
    """
    if given.run is not None:
        said = given.run.recipe().base
        base = said if model is None else replace(said, model=model, sha256=None, revision=None)
    elif model is None and given.adapter.base_name is None:
        raise RecipeError(f"--base: {given.path} does not say which base it is of; name it with --model")
    else:
        base = Base(model=model or given.adapter.base_name)
    described = base.described(phase)
    require_same_base(given.folder, described)
    linears = dict(described.model.named_modules())
    shapes = {name: matrix_shape(linears[name]) for name in updates if name in linears}
    problems = [f"it has no linear {name}" for name in updates if name not in shapes]
    unlike = {name: shape for name, shape in shapes.items() if shape != updates[name].shape}
    problems += [f"its {name} is {list(shape)}, the update {list(updates[name].shape)}" for name, shape in unlike.items()]
    if problems:
        raise AdapterError(f"{given.path} does not fit {base.model}: {some_of(problems, 3)}")
    return original_weights(described)


def _write(folder: Path, found: Findings) -> None:
    with new_folder(folder) as made:
        for name, rows in found.tables().items():
            write_text(made / f"{name}.csv", as_csv(rows))
        write_json(made / RECORD, found.as_record())
        write_text(made / PAGE, page(found))


@dataclass(frozen=True, repr=False)
class Analysis(Shown):
    """A study of an adapter: ``findings`` has every figure, linear by linear."""

    findings: Findings
    folder: Path | None
    """Where it was written to, if it was."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self.findings
        yield Text(clean(f"{found.adapter}, over {found.base or 'a base that it does not name'}"))
        for note in found.notes:
            yield Text(clean(note), "yellow")
        yield _ranks(found)
        yield Text(RANKS, "dim")
        for line in found.advice():
            yield Text(f"\n{line}")
        if found.overlaps:
            yield Text(f"\nbeside {clean(found.other)}")
            yield _overlaps(found)
            yield Text(OVERLAPS, "dim")
        if found.amplified:
            yield Text("\namplification of the base")
            yield _amplified(found)
            yield Text(AMPLIFIED, "dim")
        if self.folder is not None:
            yield Text(f"\nwrote {clean(str(self.folder / PAGE))}, beside it CSV and JSON")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number)
    return table


def _ranks(found: Findings) -> Table:
    """Return how much rank linears of each name use: the mean of the effective rank, the most that a share of energy needs."""
    table = _table("linear", "count", "rank", "eff. rank", f"for {SHARE:.0%}", f"for {NEARLY_ALL:.0%}", "share")
    for leaf in found.leaves:
        own = found.of(leaf)
        rank, needed, nearly_all = (str(max(getattr(each, name) for each in own)) for name in ("rank", "needed", "nearly_all"))
        effective, share = average(each.effective_rank for each in own), sum(each.share for each in own)
        table.add_row(clean(leaf), str(len(own)), rank, f"{effective:.1f}", needed, nearly_all, f"{share:.1%}")
    return table


def _overlaps(found: Findings) -> Table:
    table = _table("linear", "φ(1, 1) of A", "φ of all A", "by chance", "in", "out", "cosine")
    for leaf in found.leaves:
        own = [found.overlaps[each.name] for each in found.of(leaf) if each.name in found.overlaps]
        if own:
            phi = (average(float(each.phi[place, place]) for each in own) for place in (0, -1))
            chance = average(by_chance(*each.phi.shape, each.dimensions) for each in own)
            more = (average(getattr(each, name) for each in own) for name in ("inputs", "outputs", "cosine"))
            table.add_row(clean(leaf), *(f"{value:.3f}" for value in (*phi, chance, *more)))
    return table


def _amplified(found: Findings) -> Table:
    table = _table("linear", "rank", "‖W‖", "‖ΔW‖", "‖UᵀWV‖", "factor", "if W's own", "if random")
    names = ("weight", "update", "within", "factor", "own_factor", "random_factor")
    for leaf in found.leaves:
        own = [found.amplified[each.name] for each in found.of(leaf)]
        means = (average(getattr(each, name) for each in own) for name in names)
        table.add_row(clean(leaf), str(max(each.rank for each in own)), *(f"{value:.3g}" for value in means))
    return table


let_call(__name__, analyze)

if __name__ == "__main__":
    run_verb(main)
