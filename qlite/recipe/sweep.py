"""A sweep: one recipe and, for each of several runs of it, the keys in which that run differs.

recipe = "../quickstart.toml"

[runs.r4]
method.rank = 4

[runs.r64]
method.rank = 64
optimizer.lr = 5e-4
"""

import re
from collections.abc import Mapping
from pathlib import Path

from qlite.errors import RecipeError, shown
from qlite.methods.lora import LoRA
from qlite.recipe.keys import toml_value
from qlite.recipe.read import parse_toml, read_recipe
from qlite.recipe.schema import TABLES, Recipe
from qlite.recipe.write import recipe_differences

KEYS = ("recipe", "runs")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# What has to be the same in all runs: they share the base, the memory it lies in, and the micro-batches that go through it.
SHARED = ("base.", "memory.", "parallel.", "train.packing", "train.accumulation")


def read_sweep(path: Path, overrides: list[str]) -> dict[str, Recipe]:
    """Return the recipe of each run of the sweep in ``path``, by the run's name; ``overrides`` are put over the recipe that all share.

    Each run's folder is runs/, the sweep file's name, and the run's.

    Raises:
        RecipeError: with every problem: file, key, value seen, fix.
    """
    tables = parse_toml(path)
    if "runs" not in tables and "base" in tables:
        raise RecipeError(f"this is a recipe, and a sweep is wanted; to train it: python -m qlite.train {path}", str(path))
    problems = [f"{shown(key)}: a sweep has {' and '.join(KEYS)}, and no such key" for key in tables if key not in KEYS]
    given, runs = tables.get("recipe"), tables.get("runs")
    if not isinstance(given, str) or not given:
        problems.append('recipe: is not given; say which recipe all runs share: recipe = "../quickstart.toml"')
    if not isinstance(runs, dict) or not runs:
        problems.append("[runs.NAME]: no run is given; write one table for each, with the keys in which it differs: method.rank = 4")
    if problems:
        raise RecipeError(problems, str(path))
    base, found = (path.parent / given).resolve(), {}
    if not base.is_file():
        raise RecipeError(f"recipe = {toml_value(given)}: there is no file {base}", str(path))
    given_here = {text.partition("=")[0].strip() for text in overrides}
    for name, keys in runs.items():
        try:
            changes = _changes(name, keys)
            if both := [key for key in changes if key in given_here]:
                raise RecipeError([f"{key}: is set for this run and on the command line, too; leave it out of one" for key in both])
            if "output.dir" in {*changes, *given_here}:
                raise RecipeError(f"output.dir: a sweep's runs stand in runs/{path.stem}, each under its name; leave it out")
            found[name] = read_recipe(base, overrides, {**changes, "output.dir": f"runs/{path.stem}/{name}"})
        except RecipeError as error:
            problems += [f"[runs.{name}] {problem}" for problem in error.problems]
    problems = problems or _clashes(found)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)), str(path))
    return found


def _changes(name: str, keys: object) -> Mapping[str, object]:
    """Return a run's keys by their full names."""
    if not NAME.fullmatch(name):
        raise RecipeError("its name is a folder's: letters, digits, ., - and _")
    if not isinstance(keys, dict):
        raise RecipeError(f"{toml_value(keys)}: this is a table; write [runs.{name}] and its keys below")
    wrong = [table for table, values in keys.items() if table not in TABLES or not isinstance(values, dict)]
    if wrong:
        raise RecipeError([f"{shown(table)}: a key has its table before it, as in method.rank = 4" for table in wrong])
    return {f"{table}.{key}": value for table, values in keys.items() for key, value in values.items()}


def _clashes(recipes: dict[str, Recipe]) -> list[str]:
    """Return what keeps ``recipes`` from being trained together."""
    (first, one), *others = recipes.items()
    problems = []
    for name, recipe in recipes.items():
        if type(recipe.method) is not LoRA:
            problems.append(f"[runs.{name}] method.name: only lora is trained with others in one pass, and this is {recipe.method.words}")
        elif extra := [key for key in ("modules_to_save", "trained_tokens", "new_tokens") if recipe.method.get(key)]:
            problems.append(f"[runs.{name}] method.{extra[0]}: only low-rank pairs are trained with others in one pass; train it alone")
        elif recipe.method.init != "zero":
            told = f'method.init = "{recipe.method.init}": changes the base\'s weights, and all runs share them; train it alone'
            problems.append(f"[runs.{name}] {told}")
    for name, other in others:
        for difference in recipe_differences(one, other):
            if difference.startswith(SHARED):
                problems.append(f"[runs.{name}] {difference}: has to be the same as in [runs.{first}], for one base serves both")
    shared = one.memory
    lowered = {
        "memory.base": shared.base != "device",
        "memory.embedding": shared.embedding != "device",
        "memory.mlp_chunk": shared.mlp_chunk,
    }
    problems += [f"{key}: is not there for runs that are trained together; remove it" for key, is_set in lowered.items() if is_set]
    if shared.budget:
        problems.append("memory.budget: fits one run, not several together; set train.micro_batch and the keys of [memory] instead")
    return problems
