"""Write a recipe as TOML, and show all keys a recipe can have."""

import dataclasses
from collections.abc import Iterator

import tomli_w
from pydantic import TypeAdapter

from qlite.methods import METHODS
from qlite.recipe.schema import TABLES, Recipe


def recipe_tables(recipe: Recipe) -> dict[str, dict]:
    """Return the recipe as TOML's tables, every key written out; keys that are None are left out, as TOML has no null."""
    tables = {}
    for table in TABLES:
        part = getattr(recipe, table)
        values = {"name": part.name} if table == "method" else {}
        values |= {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        tables[table] = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items() if v is not None}
    return tables


def recipe_toml(recipe: Recipe) -> str:
    """Return the recipe as a TOML file that ``read_recipe`` reads back equal."""
    return tomli_w.dumps(recipe_tables(recipe))


def recipe_differences(old: Recipe, new: Recipe) -> list[str]:
    """Return the keys in which two recipes differ, as "train.seed: 0 -> 1"."""
    before, after = recipe_tables(old), recipe_tables(new)
    keys = [(table, key) for table in TABLES for key in dict.fromkeys([*before[table], *after[table]])]
    return [
        f"{table}.{key}: {before[table].get(key)!r} -> {after[table].get(key)!r}"
        for table, key in keys
        if before[table].get(key) != after[table].get(key)
    ]


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a recipe, as --keys shows it."""

    name: str
    type: str
    default: str
    text: str


def all_keys() -> Iterator[Key]:
    """Yield every key of every table, in the order of a recipe; methods beside "lora" carry their name."""
    for table, cls in TABLES.items():
        if table == "method":
            for method in METHODS.values():
                yield Key(
                    "method.name", " | ".join(f'"{name}"' for name in METHODS), f'"{method.name}"', method.__doc__.strip().splitlines()[0]
                )
                yield from _keys_of(table, method)
        else:
            yield from _keys_of(table, cls)


def _keys_of(table: str, cls: type) -> Iterator[Key]:
    schema = TypeAdapter(cls).json_schema()
    required = schema.get("required", ())
    for name, entry in schema["properties"].items():
        default = "must be given" if name in required else _toml_value(entry.get("default", {}))
        yield Key(f"{table}.{name}", _type_name(entry), default, " ".join(entry.get("description", "").split()))


def _toml_value(value: object) -> str:
    return (
        "(none)"
        if value is None
        else {True: "true", False: "false"}.get(value)
        if isinstance(value, bool)
        else f'"{value}"'
        if isinstance(value, str)
        else str(value)
    )


def _type_name(entry: dict) -> str:
    """Return a JSON schema entry's type in a TOML writer's words."""
    if "enum" in entry:
        return " | ".join(_toml_value(value) for value in entry["enum"])
    if "anyOf" in entry:
        return " | ".join(_type_name(part) for part in entry["anyOf"] if part.get("type") != "null")
    names = {"integer": "integer", "number": "number", "boolean": "true | false", "string": "text", "array": "list", "object": "table"}
    bounds = [
        f"{sign} {entry[key]}"
        for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if key in entry
    ]
    return " ".join([names[entry["type"]], *bounds])
