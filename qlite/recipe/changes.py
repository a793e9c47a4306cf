"""Put other values into a recipe's tables: "train.steps=20" of the command line, {"train.steps": 20} of Python."""

import tomllib
from collections.abc import Mapping

from qlite.errors import shown
from qlite.recipe.schema import is_utf8, tables_with
from qlite.recipe.write import plain

# Keys of which "none" is a value; on the command line it stands for "not given" everywhere else.
NONE_IS_A_WORD = ("memory.checkpointing",)


def override(tables: dict, text: str) -> str | None:
    """Put one "table.key=value" into ``tables``; return what is wrong with it, or None. A value None is as if the key were not there."""
    if not is_utf8(text):
        return f"{shown(text)}: holds bytes that are not UTF-8, and no recipe can; give what is called so another name"
    key, equals, value = text.partition("=")
    path = _key_path(key) if equals else []
    if len(path) < 2:
        found = tables_with(key.strip())
        example = f"{found[0]}.{key.strip()}={value or '...'}" if found else "train.steps=20"
        return f"{shown(text)}: an override is table.key=value, for example {example}"
    is_word = key.strip() in NONE_IS_A_WORD and value.strip() == "none"
    return _put(tables, path, "none" if is_word else _override_value(value.strip()), text)


def change(tables: dict, changes: Mapping[str, object]) -> list[str]:
    """Put ``changes`` by full name into ``tables``; return what is wrong with them. A value None is as if the key were not there."""
    problems = []
    for name, value in changes.items():
        table, dot, key = str(name).partition(".")
        if not dot:
            found = tables_with(table)
            problems.append(f'{shown(table)}: a change is named with its table, for example "{found[0] if found else "train"}.{table}"')
        elif problem := _put(tables, _key_path(str(name)) or [table, key], plain(value), shown(str(name))):
            problems.append(problem)
    return problems


def named_method(values: object) -> object:
    """Return [method] as a table, where it was written in short: ``method = "lora"`` or ``method = ["lora", "prefix"]``."""
    is_short = isinstance(values, str) or (isinstance(values, list) and all(isinstance(each, str) for each in values))
    return {"name": values} if is_short else values


def _put(tables: dict, path: list[str], value: object, named: str) -> str | None:
    """Let the key at ``path`` be ``value``; return what is wrong with that, ``named`` so, or None."""
    if path[0] == "method" and "method" in tables:
        tables["method"] = named_method(tables["method"])
    *outer, last = path
    for number, name in enumerate(outer, start=1):
        tables = tables.setdefault(name, {})
        if not isinstance(tables, dict):
            return f"{named}: {'.'.join(outer[:number])} is no table, so it has no key {'.'.join(path[number:])}"
    tables[last] = value
    return None


def _key_path(key: str) -> list[str]:
    """Return the parts of a dotted TOML key: train.steps, method.rank_per_target."model.layers.*". An empty list where it is none."""
    try:
        inner, path = tomllib.loads(f"{key} = {{}}"), []
    except ValueError:
        return []
    while isinstance(inner, dict) and len(inner) == 1:
        ((name, inner),) = inner.items()
        path.append(name)
    return path if inner == {} else []


def _override_value(value: str) -> object:
    if value == "none":
        return None
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return value  # bare words need no quotes on the command line
    return parsed["value"] if len(parsed) == 1 else value
