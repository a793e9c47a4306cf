"""Train an adapter on a quantised base, as a recipe says. What happens then is in qlite/training/run.py.

python -m qlite.train recipes/quickstart.toml
python -m qlite.train recipes/quickstart.toml train.steps=20 output.dir=runs/short
python -m qlite.train --keys
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from qlite.errors import RecipeError
from qlite.verb import let_call, run_verb

if TYPE_CHECKING:
    from qlite.recipe.schema import Recipe
    from qlite.training.result import TrainResult


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
    from qlite.recipe.read import read_recipe
    from qlite.training.console import open_console
    from qlite.training.run import begin, title_of
    from qlite.training.summary import print_summary

    recipe = read_recipe(args.recipe, args.overrides)
    print_summary(begin(recipe, args.fresh, open_console(title_of(recipe))))


def train(recipe: "Recipe | str | os.PathLike[str]", *, fresh: bool = False, quiet: bool = False) -> "TrainResult":
    """Train ``recipe``, a Recipe or the path of a TOML file, and return what came of it; go on with a run that is there.

    A run that is finished already is not trained again: its result is returned.

    fresh: delete the run of that folder first, instead of going on with it.
    quiet: show nothing.

    Raises:
        QliteError: the recipe, the data, the model's files or the machine do not allow it, or the loss is no number.
        KeyboardInterrupt: Ctrl-C, or the notebook's kernel was interrupted; a checkpoint of the last whole step is written, if there is
            one, and the same call goes on from it. A second one stops at once.
    """
    from qlite.calls import called
    from qlite.recipe.read import recipe_of
    from qlite.training.notebook import console_for
    from qlite.training.result import TrainResult
    from qlite.training.run import begin, title_of

    with called():
        given = recipe_of(recipe)
        try:
            return TrainResult.of(begin(given, fresh, console_for(title_of(given), quiet)))
        except KeyboardInterrupt as stopped:
            stopped.add_note("The same call goes on from the newest checkpoint, if one was written.")
            raise


let_call(__name__, train)

if __name__ == "__main__":
    run_verb(main, interrupted="interrupted; the same command goes on from the newest checkpoint, if one was written")
