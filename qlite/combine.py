"""Add adapters up, each times a number, or make one's rank smaller, and write the result as PEFT's two files.

python -m qlite.combine runs/a:0.7 runs/b:0.3 --out mix              exactly 0.7 dW_a + 0.3 dW_b; the ranks add up
python -m qlite.combine runs/a:0.7 runs/b:0.3 --out mix --rank 16    the nearest update of rank 16, and how near it is
python -m qlite.combine runs/a --out small --rank 4                  one adapter in a smaller rank
python -m qlite.combine runs/a runs/b:-1 --out difference            what a has and b has not

Each is a finished run or a folder in PEFT's format, alone or with a number behind a colon. The sum is of the updates B A, not of the A
and the B: its factors are all factors side by side. No weight of the base is needed.
"""

import argparse
import math
import sys
from pathlib import Path

from qlite.errors import AdapterError, QliteError, RecipeError, RunError, shown
from qlite.files import new_folder
from qlite.formats.peft import WEIGHTS, write_updates
from qlite.methods.low_rank import LowRank, Resized, resize, weighted_sum
from qlite.recipe.share import local_name
from qlite.training.adapter_folders import BASE_KEYS, TEMPLATE_KEYS, Given, contradictions, read_updates, run_at
from qlite.training.provenance import common_provenance, read_provenance
from qlite.units import format_bytes
from qlite.verb import run_verb


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qlite.combine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapters", nargs="+", metavar="FOLDER[:NUMBER]", help="an adapter and what it is multiplied by, 1 if not said")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--rank", type=int, help="largest rank of the result; without it nothing is lost")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    args = parser.parse_args(argv)
    if args.rank is not None and args.rank < 1:
        raise RecipeError(f"--rank {args.rank}: should be 1 or more")
    if args.out.exists() and not args.force:
        raise RunError(f'"{args.out}" exists already; choose another --out, or replace it with --force')
    given, weights, updates = read_all(args.adapters)
    if args.rank is None and weights == [1.0]:
        raise RecipeError("one adapter as it is: nothing to do; name another one, a number behind it (:0.5), or --rank")
    found = combine(list(zip(weights, updates, strict=True)), args.rank)
    show(found)
    with new_folder(args.out) as folder:
        said = common_provenance([read_provenance(each.folder) for each in given])
        write_updates(folder, {layer: each.update for layer, each in found.items()}, base_name_of(given), said)
    ranks = sorted({each.update.rank for each in found.values()})
    told = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    size = format_bytes((args.out / WEIGHTS).stat().st_size)
    print(f"wrote {args.out}: {told} on {len(found)} linears, {size}; load it with peft.PeftModel.from_pretrained(base, {str(args.out)!r})")


def read_all(texts: list[str]) -> tuple[list[Given], list[float], list[dict[str, LowRank]]]:
    """Return the adapters that ``texts`` name, their numbers, and what each does to each linear.

    Raises:
        AdapterError: for all that is wrong with them at once.
    """
    problems: list[str] = []
    parts = [part for text in texts if (part := _parse(text, problems))]
    given = [each for each, _ in parts]
    updates = [read_updates(each, problems) for each in given]
    problems += contradictions(given, BASE_KEYS)
    problems += _unfit(given, updates)
    if problems:
        raise AdapterError("\n".join(problems))
    for line in contradictions(given, TEMPLATE_KEYS):
        print(line, file=sys.stderr)
    return given, [weight for _, weight in parts], updates


def combine(parts: list[tuple[float, dict[str, LowRank]]], rank: int | None) -> dict[str, Resized]:
    """Return the sum of ``parts``, each times its number, linear by linear, in at most ``rank``.

    A linear that some parts leave alone gets what the others do. No rank becomes more than the linear's own, which loses nothing.
    """
    layers = dict.fromkeys(layer for _, updates in parts for layer in updates)
    found = {}
    for layer in layers:
        total = weighted_sum([(weight, updates[layer]) for weight, updates in parts if layer in updates])
        most = min(*total.shape, rank or total.rank)
        near = resize(total, most)
        found[layer] = near if total.rank > most else Resized(total, 1.0, 0.0, 0.0, near.norm)
    return found


def show(found: dict[str, Resized]) -> None:
    """Print what the smaller ranks keep and lose, linear by linear, and where most is lost; nothing where nothing is."""
    lossy = {layer: each for layer, each in found.items() if each.kept < 1}
    if not lossy:
        return
    width = max(map(len, lossy))
    print(f"{'linear':{width}}  rank  energy kept  ||dW||_F  ||dW - dW_r||_F  ||dW - dW_r||_2")
    for layer, each in lossy.items():
        numbers = f"{each.update.rank:4}  {each.kept:11.4%}  {each.norm:8.3g}  {each.error:15.3g}  {each.largest_dropped:15.3g}"
        print(f"{layer:{width}}  {numbers}")
    worst, its = max(lossy.items(), key=lambda item: item[1].error / item[1].norm)
    error, norm = (math.sqrt(sum(getattr(each, name) ** 2 for each in found.values())) for name in ("error", "norm"))
    print(f"worst: {worst}, {its.error / its.norm:.2%} of ||dW||_F lost; all linears together {error / norm:.2%}")


def base_name_of(given: list[Given]) -> str | None:
    """Return the base as the first adapter that names it does, without folders; other names for it are said on standard error."""
    names = dict.fromkeys(local_name(name) for each in given if (name := each.adapter.base_name))
    if len(names) > 1:
        told = ", ".join(f'"{shown(name)}"' for name in names)
        print(f"the adapters call their base differently ({told}); the first is written", file=sys.stderr)
    return next(iter(names), None)


def _parse(text: str, problems: list[str]) -> tuple[Given, float] | None:
    """Return the adapter and the number that ``text`` says; where it cannot, None, and ``problems`` has one more."""
    folder, number = text, "1"
    if not Path(text).exists() and ":" in text:  # a folder's own name may hold a colon: "C:\runs\a"
        before, _, after = text.rpartition(":")
        if _is_number(after) or Path(before).exists():
            folder, number = before, after
    try:
        if not _is_number(number) or not math.isfinite(float(number)) or float(number) == 0:
            raise RecipeError(f"the number {shown(number)} behind the colon should be finite and not 0")
        return Given(text, Path(folder), run_at(Path(folder))), float(number)
    except QliteError as error:
        problems.append(f"{shown(text)}: {error}")
        return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unfit(given: list[Given], updates: list[dict[str, LowRank]]) -> list[str]:
    problems, shapes = [], {}
    for each, own in zip(given, updates, strict=True):
        if any(update.lengths is not None for update in own.values()):
            problems.append(
                f"{each.name}: is DoRA, which makes each row of W + s B A as long as was trained: that is no update B A to be added or "
                "cut; merge it instead (python -m qlite.export --merge)"
            )
        other = next(
            (layer for layer, update in own.items() if shapes.setdefault(layer, (update.shape, each.name))[0] != update.shape), None
        )
        if other is not None:
            (shape, name), layer = shapes[other], shown(other)
            problems.append(f"{each.name}: its {layer} is {list(own[other].shape)}, that of {name} {list(shape)}; they are not of one base")
    return problems


if __name__ == "__main__":
    run_verb(main)
