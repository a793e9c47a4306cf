"""Write a recipe as TOML, and say in which keys two recipes differ."""

import dataclasses
import os
from collections.abc import Mapping

import tomli_w

from qlite.methods import Combined, Method
from qlite.recipe.keys import toml_value
from qlite.recipe.schema import TABLES, Recipe
from qlite.table import Table


def recipe_tables(recipe: Recipe) -> dict[str, dict]:
    """Return the recipe as TOML's tables, every key written out; keys that are None are left out, as TOML has no null."""
    return {table: plain(getattr(recipe, table)) for table in TABLES}


def plain(value: object) -> object:
    """Return what TOML has for a value of Python's: tables for dicts and for a recipe's objects, lists for tuples, text for paths.

    What is None is left out, as TOML has no null.
    """
    if isinstance(value, Combined):
        names = [part.name for part in value.parts]
        return {"name": names, **{part.name: _fields(part) for part in value.parts}}
    if isinstance(value, Table):
        named = {"name": value.name} if isinstance(value, Method) else {}
        return named | _fields(value)
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _fields(table: Table) -> dict:
    return plain({field.name: getattr(table, field.name) for field in dataclasses.fields(table)})


def recipe_toml(recipe: Recipe) -> str:
    """Return the recipe as a TOML file that ``read_recipe`` reads back equal."""
    return tomli_w.dumps(recipe_tables(recipe))


def recipe_differences(old: Recipe, new: Recipe) -> list[str]:
    """Return the keys in which two recipes differ, as "train.seed: 0 -> 1"; of several methods as "method.lora.rank: 4 -> 8"."""
    before, after = recipe_tables(old), recipe_tables(new)
    found = []
    for table in TABLES:
        then, now = full_names(table, before[table]), full_names(table, after[table])
        keys = [key for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key)]
        found += [f"{key}: {toml_value(then.get(key))} -> {toml_value(now.get(key))}" for key in keys]
    return found


def full_names(table: str, values: Mapping[str, object]) -> dict[str, object]:
    """Return the ``values`` of ``table`` by their full names; those of several methods each by its own: "method.lora.rank"."""
    names = values.get("name") if table == "method" else None
    parts = [key for key, part in values.items() if isinstance(names, list) and key in names and isinstance(part, Mapping)]
    own = {f"{table}.{key}": value for key, value in values.items() if key not in parts}
    return own | {f"{table}.{part}.{key}": value for part in parts for key, value in values[part].items()}
