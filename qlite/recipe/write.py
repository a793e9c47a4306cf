"""Write a recipe as TOML, and say in which keys two recipes differ."""

import dataclasses

import tomli_w

from qlite.recipe.keys import toml_value
from qlite.recipe.schema import TABLES, Recipe


def recipe_tables(recipe: Recipe) -> dict[str, dict]:
    """Return the recipe as TOML's tables, every key written out; keys that are None are left out, as TOML has no null."""
    tables = {}
    for table in TABLES:
        part = getattr(recipe, table)
        values = {"name": part.name} if table == "method" else {}
        values |= {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        tables[table] = {key: _toml(value) for key, value in values.items() if value is not None}
    return tables


def _toml(value: object) -> object:
    """Return a key's value as TOML takes it."""
    if dataclasses.is_dataclass(value):
        return {field.name: _toml(v) for field in dataclasses.fields(value) if (v := getattr(value, field.name)) is not None}
    return [_toml(part) for part in value] if isinstance(value, tuple) else value


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
