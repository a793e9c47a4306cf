"""Train an adapter on a quantised base, as a recipe says. What happens then is in qlite/training/run.py.

python -m qlite.train recipes/quickstart.toml
python -m qlite.train recipes/quickstart.toml train.steps=20 output.dir=runs/short
python -m qlite.train --keys
"""

import argparse
from pathlib import Path

from qlite.errors import RecipeError
from qlite.verb import run_verb


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qlite.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path, help="a TOML file, for example recipes/quickstart.toml")
    parser.add_argument("overrides", nargs="*", help="table.key=value, put over the recipe")
    parser.add_argument("--fresh", action="store_true", help="delete the run of that folder first, instead of going on with it")
    parser.add_argument("--keys", action="store_true", help="print every key a recipe can have")
    args = parser.parse_intermixed_args(argv)
    # Imported only now: torch and transformers take seconds, and neither --help nor a mistyped option needs them.
    if args.keys:
        from qlite.recipe.keys import print_keys

        print_keys()
        return
    if args.recipe is None:
        raise RecipeError("no recipe given; try: python -m qlite.train recipes/quickstart.toml")
    from qlite.training.run import begin

    begin(args.recipe, args.overrides, args.fresh)


if __name__ == "__main__":
    run_verb(main, interrupted="interrupted; the same command goes on from the newest checkpoint, if one was written")
