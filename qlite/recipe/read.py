"""Read a recipe from TOML and key=value overrides; report everything that is wrong with it at once."""

import json
import tomllib
from difflib import get_close_matches
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from qlite.errors import RecipeError
from qlite.methods import METHODS
from qlite.recipe.schema import TABLES, Recipe, table_class


def read_recipe(path: Path, overrides: list[str] = ()) -> Recipe:
    """Return the recipe in ``path`` with ``overrides`` ("train.steps=20") put over it.

    Raises:
        RecipeError: with every problem: key, value seen, fix.
    """
    tables = _parse(path)
    problems = [problem for text in overrides if (problem := _override(tables, text))]
    return build_recipe(tables, str(path), problems, default_dir=f"runs/{path.stem}")


def build_recipe(tables: dict, path: str, problems: list[str] = (), default_dir: str = "") -> Recipe:
    """Return the recipe that ``tables`` (as TOML gives them) describe; ``path`` is only named in messages.

    Raises:
        RecipeError: with every problem, those in ``problems`` first.
    """
    problems = list(problems)
    for table in tables.keys() - TABLES.keys():
        problems.append(f"{table}: no such table; {_suggest(table, TABLES)}")
    parts = {}
    for table in TABLES:
        values = tables.get(table, {})
        if not isinstance(values, dict):
            problems.append(f"{table} = {values!r}: this is a table; write [{table}] and its keys below")
            continue
        part, wrong = _read_table(table, dict(values))
        problems += wrong
        parts[table] = part
    if not problems:
        recipe = Recipe(**parts)
        if default_dir and not recipe.output.dir:
            recipe = build_recipe({**tables, "output": {**tables.get("output", {}), "dir": default_dir}}, path)
        problems = recipe.problems()
    if problems:
        raise RecipeError(problems, path)
    return recipe


def _parse(path: Path) -> dict:
    try:
        # utf-8-sig: editors on Windows put a byte order mark in front.
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1) if path.parent.is_dir() else []
        hint = f'; did you mean "{path.parent / near[0]}"?' if near else ""
        raise RecipeError(f"cannot read the recipe ({error.strerror}){hint}", str(path)) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"byte {error.start}: not UTF-8; save the recipe as UTF-8", str(path)) from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"not TOML: {error}", str(path)) from error


def _override(tables: dict, text: str) -> str | None:
    """Put one "table.key=value" into ``tables``; return what is wrong with it, or None."""
    key, equals, value = text.partition("=")
    table, dot, name = key.strip().partition(".")
    if not (equals and dot and table and name):
        return f"{text}: an override is table.key=value, for example train.steps=20"
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # bare words need no quotes on the command line
    tables.setdefault(table, {})
    if isinstance(tables[table], dict):
        tables[table][name] = parsed
    return None


def _read_table(table: str, values: dict) -> tuple[object, list[str]]:
    """Return (the table's object or None, problems)."""
    if table == "method" and values.get("name", "lora") not in METHODS:
        return None, [f"method.name = {values['name']!r}: no such method; {_suggest(str(values['name']), METHODS)}"]
    cls = table_class(table, values)
    if table == "method":
        values.pop("name", None)
    try:
        # By way of JSON: strict about types there, yet a list may be a tuple and a table a dataclass.
        return TypeAdapter(cls).validate_json(json.dumps(values, default=str)), []
    except ValidationError as error:
        keys = cls.__dataclass_fields__
        return None, [_explain(table, item, keys) for item in error.errors(include_url=False)]


def _explain(table: str, item: dict, keys: dict) -> str:
    """Return one of pydantic's findings in our words: key, value seen, fix."""
    key = ".".join([table, *(str(part) for part in item["loc"] if isinstance(part, int) or str(part).isidentifier())])
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: no such key; {_suggest(str(item['loc'][0]), keys)}"
    if item["type"] in ("missing", "missing_argument"):
        return f"{key}: must be given"
    wanted = item["msg"][0].lower() + item["msg"][1:]
    return f"{key} = {item['input']!r}: {wanted.replace('input should be', 'should be')}"


def _suggest(word: str, known: object) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f'did you mean "{close[0]}"?' if close else f"known: {', '.join(known)}"
