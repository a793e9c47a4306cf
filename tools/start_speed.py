"""How long a run takes from its command to its first training step, everything cached but the first time.

    python tools/start_speed.py recipes/quickstart.toml --times 4

Each start is a process of its own, told like ``python -m qlite.train RECIPE --fresh`` (with train.exact_match_rows=0, for answers are no
part of a start, and a folder of its own), and ended where the first step would begin. Seconds are counted from the process's start.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def main(argv: list[str]) -> int:
    """Start the recipe a few times and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="table.key=value, put over the recipe")
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # this process is one of the starts
    args = parser.parse_intermixed_args(argv)
    if args.here:
        start(args.recipe, args.overrides)
        return 1
    found = []
    with tempfile.TemporaryDirectory() as folder:
        keys = [*args.overrides, "train.exact_match_rows=0", f"output.dir={folder}/run"]
        for _ in range(args.times):
            command = [sys.executable, __file__, "--here", str(args.recipe), *keys]
            out = subprocess.run(command, capture_output=True, text=True)
            if out.returncode:
                print(out.stderr, file=sys.stderr)
                return out.returncode
            found.append(float(out.stdout.splitlines()[-1]))
            print(f"{found[-1]:.1f} s", flush=True)
    later = found[1:] or found
    print(f"first {found[0]:.1f} s, later {statistics.median(later):.1f} s ({min(later):.1f} to {max(later):.1f})")
    return 0


def start(recipe: Path, overrides: list[str]) -> None:
    """Begin the run and end this process where the first step would begin."""
    import time

    import psutil

    from qlite.recipe.read import read_recipe
    from qlite.training import run
    from qlite.training.console import open_console
    from qlite.training.step import Stepper

    def step(*_: object, **__: object) -> None:
        print(time.time() - psutil.Process().create_time(), flush=True)
        sys.exit(0)

    Stepper.step = step
    run.begin(read_recipe(recipe, overrides), fresh=True, console=open_console(recipe.stem))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
