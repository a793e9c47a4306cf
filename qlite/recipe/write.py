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
    """Return the keys in which two recipes differ, as "train.seed: 0 -> 1"."""
    before, after = recipe_tables(old), recipe_tables(new)
    keys = [(table, key) for table in TABLES for key in dict.fromkeys([*before[table], *after[table]])]
    return [
        f"{table}.{key}: {toml_value(before[table].get(key))} -> {toml_value(after[table].get(key))}"
        for table, key in keys
        if before[table].get(key) != after[table].get(key)
    ]
