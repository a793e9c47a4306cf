"""Train several adapters over one base at once: other ranks, learning rates, seeds or rows, for little more memory than one.

python -m qlite.sweep recipes/sweeps/ranks.toml
python -m qlite.sweep recipes/sweeps/ranks.toml train.steps=20

A sweep file names a recipe, and for each run the keys in which it differs:

    recipe = "../quickstart.toml"
    [runs.r4]
    method.rank = 4
    [runs.r64]
    method.rank = 64
    optimizer.lr = 5e-4

The rows of all runs go through the frozen weights in one pass. Each run is one like any other: it has its folder, runs/ranks/r4, its
report and its checkpoints, and goes on where it was stopped. python -m qlite.report runs/ranks/* lays their curves over each other.
"""

import argparse
import shlex
from pathlib import Path

from qlite.verb import run_verb


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qlite.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, help="a TOML file, for example recipes/sweeps/ranks.toml")
    parser.add_argument("overrides", nargs="*", help="table.key=value, put over the recipe that all share")
    parser.add_argument("--fresh", action="store_true", help="delete the runs of that sweep first, instead of going on with them")
    args = parser.parse_intermixed_args(argv)
    # Imported only now: torch and transformers take seconds, and --help does without.
    from qlite.recipe.sweep import read_sweep
    from qlite.training.sweep import begin_sweep
    from qlite.training.sweep_console import SweepLines

    recipes = read_sweep(args.sweep, args.overrides)
    with SweepLines(f"qlite  sweep {args.sweep.stem}  {len(recipes)} runs", list(recipes)) as console:
        runs = begin_sweep(recipes, args.fresh, console)
    width = max(map(len, runs))
    print(f"\n{'run':<{width}}  held-out loss  last loss  exact answers")
    for name, run in runs.items():
        result = run.result
        answers = result["answers"][-1] if result["answers"] else None
        exact = f"{answers['exact']} of {answers['rows']}" if answers else "-"
        print(f"{name:<{width}}  {_number(result['eval_loss']):>13}  {_number(result['last_loss']):>9}  {exact:>13}")
    folder = next(iter(runs.values())).path.parent
    paths = shlex.join([str(run.path) for run in runs.values()])
    print(f"\nNext:  python -m qlite.report {paths} --out {shlex.quote(str(folder / 'report.html'))}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    run_verb(main, interrupted="interrupted; the same command goes on from the newest checkpoints, if any were written")
