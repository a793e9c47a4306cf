"""Read a recipe from TOML and key=value overrides; report everything that is wrong with it at once."""

import dataclasses
import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pydantic import ValidationError

from qlite.errors import RecipeError, shown
from qlite.given import read_given
from qlite.methods import METHODS, Combined, Method
from qlite.recipe.changes import change, named_method, override
from qlite.recipe.keys import closest, describe, one_of, table_adapter, table_in_list, table_keys, table_schema, toml_key, toml_value
from qlite.recipe.other_names import OTHER_NAMES
from qlite.recipe.schema import TABLES, Recipe, table_class, tables_with
from qlite.recipe.write import plain
from qlite.units import KIB

SHOWN_CHARACTERS = 80
"""Longest value that a message repeats."""
MOST_RECIPE_BYTES = 64 * KIB
"""A recipe has a few thousand; Python's reader of hostile ones needs a time that grows with the square of the size."""
# So it does for a key of thousands of parts; none of a recipe's has more than four. Whether it stands in a text is not asked.
LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*"|'[^'\n]*')[ \t]*+\.[ \t]*+){100}""")

# A part of tomllib's message -> what to do about it.
TOML_HINTS = {
    "Invalid value": 'text stands in "quotes", true and false in small letters',
    "Unescaped": "in \"...\" a backslash is written \\\\; or put the text in '...'",
    "Cannot overwrite a value": "this key stands twice in its table; remove one",
    "Cannot declare": "this table stands twice; put its keys together under one of them",
    "Expected '=' after a key": "a line is key = value, or [table]",
}


def read_recipe(path: Path, overrides: list[str] = (), changes: Mapping[str, object] = MappingProxyType({})) -> Recipe:
    """Return the recipe in ``path`` with ``overrides`` ("train.steps=20") and ``changes`` ({"train.steps": 20}) put over it.

    Raises:
        RecipeError: with every problem: key, value seen, fix.
    """
    tables = parse_toml(path)
    problems = [problem for text in overrides if (problem := override(tables, text))]
    problems += change(tables, changes)
    return build_recipe(tables, str(path), problems, default_dir=f"runs/{path.stem}")


def recipe_of_tables(tables: Mapping[str, object], changes: Mapping[str, object]) -> Recipe:
    """Return the recipe that Python's ``tables`` say: dicts, or the objects themselves; ``changes`` as in ``read_recipe``.

    Raises:
        RecipeError: with every problem: key, value seen, fix.
    """
    if not isinstance(tables, Mapping):
        raise RecipeError(f'{_shown(plain(tables))}: should be a dict of tables: {{"base": {{"model": ...}}, "train": {{"steps": 20}}}}')
    own = {str(table): plain(values) for table, values in tables.items()}
    problems = change(own, changes)
    return build_recipe(own, "recipe", problems)


def recipe_of(given: Recipe | str | os.PathLike[str]) -> Recipe:
    """Return the recipe that a caller from Python has given: one as it is, or the path of a TOML file, which is read.

    Raises:
        RecipeError: it is neither, or with every problem of the file.
    """
    if isinstance(given, Recipe):
        return recipe_of_tables({table: getattr(given, table) for table in TABLES}, {})  # its parts may have been put together by hand
    if isinstance(given, str | os.PathLike):
        return read_recipe(Path(given))
    told = "; a dict of tables is made one by Recipe.from_tables" if isinstance(given, Mapping) else ""
    raise RecipeError(f"a recipe is a Recipe, or the path of a TOML file, and not of the type {type(given).__name__}{told}")


def build_recipe(tables: dict, path: str, problems: list[str] = (), default_dir: str = "") -> Recipe:
    """Return the recipe that ``tables`` (as TOML gives them) describe; ``path`` is only named in messages.

    Raises:
        RecipeError: with every problem, those in ``problems`` first.
    """
    problems = [*problems, *(_unknown_table(table, value) for table, value in tables.items() if table not in TABLES)]
    wrong: dict[str, str] = {}  # key -> what is wrong with it
    parts = {table: _read_table(table, tables.get(table, {}), wrong) for table in TABLES}
    if default_dir and not parts["output"].dir:
        parts["output"] = dataclasses.replace(parts["output"], dir=default_dir)
    # A contradiction names the keys it rests on; one that rests on a key without a readable value is none yet.
    contradictions = [text for text in Recipe(**parts).problems() if not any(key in text for key in wrong)]
    problems += [*wrong.values(), *contradictions]
    if problems:
        raise RecipeError(problems, path)
    return Recipe(**parts)


def _read_table(table: str, values: object, wrong: dict[str, str]) -> object:
    """Return the table's object; what is wrong goes into ``wrong`` by key, and such a key has its default in the object."""
    if table == "method":
        return _read_method(values, wrong)
    return _read_as(table, table_class(table, values), values, wrong)


def _read_method(values: object, wrong: dict[str, str]) -> Method:
    """Return what [method] says, or ``method = ["lora", "prefix"]``: one method or several, each with a table of its own then."""
    values = named_method(values)
    names = values.get("name") if isinstance(values, dict) else None
    names = "lora" if names is None else names
    single = names if isinstance(names, list) else [names]
    for number, name in enumerate(single):
        if not (isinstance(name, str) and name in METHODS):
            fix = _right_method(name) if isinstance(name, str) else f"should be {one_of(METHODS)}"
            wrong["method.name"] = f"method.name = {_shown(names)}: no such method{_which(name, names)}; {fix}"
        elif name in single[:number]:
            wrong["method.name"] = f'method.name = {_shown(names)}: "{name}" stands twice; leave it out once'
    if not single:
        wrong["method.name"] = f"method.name = []: names no method; should be {one_of(METHODS)}, or several of them"
    if "method.name" in wrong:
        return METHODS["lora"]()  # its keys cannot be judged without knowing the method
    if not isinstance(names, list):
        own = values
        if isinstance(values, dict):
            tables = (values.keys() & METHODS.keys()) - {field.name for field in dataclasses.fields(METHODS[names])}
            wrong |= {f"method.{key}": _is_table_of_another(key, values[key], [names]) for key in tables}
            own = {key: value for key, value in values.items() if key not in {"name", *tables}}
        return _read_as("method", METHODS[names], own, wrong)
    for key in values.keys() - {"name", *names}:
        if key in METHODS:
            wrong[f"method.{key}"] = _is_table_of_another(key, values[key], names)
            continue
        fields = [name for name in names if key in {field.name for field in dataclasses.fields(METHODS[name])}]
        fix = f"it stands in [method.{fields[0]}]" if fields else f"[method] has: name, {', '.join(names)}"
        wrong[f"method.{key}"] = f"method.{shown(toml_key(key))} = {_shown(values[key])}: no such key; {fix}"
    parts = tuple(_read_as(f"method.{name}", METHODS[name], {} if values.get(name) is None else values[name], wrong) for name in names)
    return parts[0] if len(parts) == 1 else Combined(parts=parts)


def _right_method(name: str) -> str:
    """Return what was probably meant by ``name``, which no method has."""
    several = [part.strip() for part in re.split(r"[,+]", name)]
    if len(several) > 1 and all(part in METHODS for part in several):
        return f"several are named in a list: name = {_shown(several)}"
    near = closest(name, METHODS)
    return f'did you mean "{near}"?' if near else f"should be {one_of(METHODS)}"


def _is_table_of_another(key: str, value: object, names: list[str]) -> str:
    """Return what is wrong with [method.KEY], a method's table, beside the methods ``names``."""
    both = f"to train with it too, write name = {_shown([*names, key])}"
    fix = f"of one method alone the keys stand in [method] itself, without [method.{key}]" if [key] == names else both
    return f"method.{key} = {_shown(value)}: {fix}"


def _which(name: object, names: object) -> str:
    return f" as {_shown(name)}" if isinstance(names, list) else ""


def _read_as(table: str, cls: type, values: object, wrong: dict[str, str]) -> object:
    """Return the ``cls`` that ``values`` of ``table`` describe; what is wrong goes into ``wrong`` as above."""
    if not isinstance(values, dict):
        once = f"write [{table}] once, in single brackets" if isinstance(values, list) else f"write [{table}] and its keys below"
        wrong[table] = f"{table} = {_shown(values)}: this is a table; {once}"
        values = {}
    fields = [field.name for field in dataclasses.fields(cls)]
    values = {key: _without_none(value) for key, value in values.items() if value is not None or key not in fields}
    try:
        # By way of JSON: strict about types there, yet a list may be a tuple and a table a dataclass.
        return table_adapter(cls).validate_json(json.dumps(_as_json(values)))
    except ValidationError as error:
        unread = _explain(table, cls, values, error, wrong)
    filled = {field.name: "?" for field in dataclasses.fields(cls) if f"{table}.{field.name}" in unread and _is_required(field)}
    readable = {key: value for key, value in values.items() if f"{table}.{key}" not in unread}
    return table_adapter(cls).validate_json(json.dumps(_as_json(readable | filled)))


def _without_none(value: object) -> object:
    """Return ``value``; of a table, but for the keys that are to be as if they were not there."""
    return {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else value


def _explain(table: str, cls: type, values: dict, error: ValidationError, wrong: dict[str, str]) -> set[str]:
    """Put pydantic's findings into ``wrong`` in our words: key, value seen, fix. Return the keys of the table they are about."""
    schema = table_schema(cls)
    own = [key.name.rpartition(".")[2] for key in table_keys(table, cls) if key.name.startswith(f"{table}.")]
    unread = set()
    for item in error.errors(include_url=False, include_input=False):
        name, *inner = item["loc"]
        unread.add(f"{table}.{name}")
        listed = table_in_list(schema, schema["properties"].get(name, {}))
        if listed and isinstance(values.get(name), list):
            if inner[0] != "str":  # pydantic tries all that the key may be; of a list only the list is of interest
                wrong |= _explain_listed(f"{table}.{name}", values[name], inner[1:], listed)
        else:
            wrong |= _explain_key(table, values, [name, *inner], schema["properties"], own)
    return unread


def _explain_listed(key: str, tables: list, place: list, schema: dict) -> dict[str, str]:
    """Return what is wrong with one table of a list, by key: ``place`` is its index and what is wrong in it."""
    if not place:
        return {key: f"{key} = {_shown(tables)}: should be tables, each under [[{key}]]"}
    index, *inner = place
    name = f"{key}[{index + 1}]"
    if not inner or not isinstance(tables[index], dict):
        return {name: f"{name} = {_shown(tables[index])}: should be a table, written under [[{key}]]"}
    return _explain_key(name, tables[index], inner, schema["properties"], list(schema["properties"]))


def _explain_key(table: str, values: dict, place: list, entries: dict, own: list[str]) -> dict[str, str]:
    """Return what is wrong with one key of ``table``, by key; ``own``: the keys that it has."""
    name, *inner = place
    key = f"{table}.{name}"
    if name not in entries:
        return {key: f"{table}.{shown(toml_key(name))} = {_shown(values[name])}: no such key; {_right_key(table, own, name)}"}
    if name not in values:
        return {key: f"{key}: must be given. {entries[name]['description']}"}
    # A key that may be left out takes "nothing" beside its table.
    parts = [part for part in [entries[name], *entries[name].get("anyOf", ())] if "additionalProperties" in part]
    inner = [part for part in inner if part in values[name]] if isinstance(values[name], dict) else []
    if parts and inner:
        part = f"{key}.{shown(toml_key(inner[0]))}"
        return {part: _misfit(part, values[name][inner[0]], parts[0]["additionalProperties"])}
    return {key: _misfit(key, values[name], entries[name])}


def _misfit(key: str, value: object, entry: dict) -> str:
    """Return that ``value`` is not what the JSON schema's ``entry`` takes, and the likely fix."""
    return f"{key} = {_shown(value)}: should be {describe(entry)}{_likely_fix(value, entry)}"


def _likely_fix(value: object, entry: dict) -> str:
    kinds = {part["type"] for part in [entry, *entry.get("anyOf", ())] if "type" in part}
    if isinstance(value, str) and "enum" in entry:
        choices = {str(choice): choice for choice in entry["enum"]}
        near = closest(value, choices)
        return f"; did you mean {toml_value(choices[near])}?" if near else ""
    if isinstance(value, str) and kinds & {"integer", "number", "boolean"}:
        return f"; remove the quotes: {value}" if re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?|true|false", value) else ""
    if isinstance(value, float) and not math.isfinite(value):
        return "; inf and nan are no numbers to compute with"
    if isinstance(value, float) and "integer" in kinds and value.is_integer():
        return f"; write {int(value)}"
    is_free = not any(part.keys() & {"pattern", "enum"} for part in [entry, *entry.get("anyOf", ())])
    if kinds - {"null", "array"} == {"string"} and is_free and not isinstance(value, str | list | dict | None):
        return f'; if that is meant, put it in quotes: "{toml_value(value)}"'
    return ""


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _right_key(table: str, own: list[str], name: str) -> str:
    """Return where the key ``name``, which ``table`` does not have, should probably stand, or what ``table`` has."""
    top = table.partition(".")[0]
    elsewhere = [other for other in tables_with(name) if other != top]
    others = [other for other, cls in METHODS.items() if name in {f.name for f in dataclasses.fields(cls)}] if top == "method" else []
    if others:
        return f"only {one_of(others)} has it, and this is another method"
    owner, _, known = OTHER_NAMES.get(name.lower(), "").partition(".")
    if known and not (owner == top == "method" and known not in own):
        return f"here it is called {table if owner == top else owner}.{known}"
    if elsewhere:
        return f"it stands in [{elsewhere[0]}]"
    near = closest(name, own)
    return f'did you mean "{near}"?' if near else f"[{table}] has: {', '.join(own)}"


def _unknown_table(table: str, value: object) -> str:
    if isinstance(value, dict):
        near = closest(table, TABLES)
        return f"[{shown(toml_key(table))}]: no such table; " + (f"did you mean [{near}]?" if near else f"there are: {', '.join(TABLES)}")
    found = tables_with(table)
    known = OTHER_NAMES.get(table.lower(), f"{found[0]}.{table}" if found else "")
    fix = f"write it as {known.partition('.')[2]} under [{known.partition('.')[0]}]" if known else f"there are: {', '.join(TABLES)}"
    return f"{shown(toml_key(table))} = {_shown(value)}: stands above all tables; {fix}"


def _as_json(value: object, levels: int = 4) -> object:
    """Return ``value`` as JSON has it. What JSON has not (dates), or no key has (deep nesting), becomes a table that no key takes."""
    if levels and isinstance(value, dict):
        return {key: _as_json(part, levels - 1) for key, part in value.items()}
    if levels and isinstance(value, list):
        return [_as_json(part, levels - 1) for part in value]
    is_plain = value is None or isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() < 64)
    return value if is_plain else {"": {}}


def _shown(value: object) -> str:
    text = toml_value(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


# The file


def parse_toml(path: Path) -> dict:
    """Return the tables of the TOML file ``path``. Raises RecipeError."""
    try:
        # utf-8-sig: editors on Windows put a byte order mark in front.
        text = read_given(path, MOST_RECIPE_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"cannot read the recipe ({error.strerror}){_near_files(path)}", str(path)) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"byte {error.start}: not UTF-8; save the recipe as UTF-8", str(path)) from error
    if found := LONG_KEY.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise RecipeError(f"line {line}: not TOML that can be read: a key of more than 100 parts", str(path))
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise RecipeError("not TOML that can be read: brackets are nested too deeply", str(path)) from error
    except ValueError as error:  # tomllib's own, and Python's for a number of thousands of digits
        raise RecipeError(_toml_problem(text, str(error)), str(path)) from error


def _toml_problem(text: str, message: str) -> str:
    """Return what is not TOML, with its line and the likely fix."""
    hint = next((f"; {hint}" for part, hint in TOML_HINTS.items() if part in message), "")
    place = re.search(r"^(.*) \(at line (\d+), column (\d+)\)$", message)
    if place is None and message.endswith(" (at end of document)"):
        return f"line {len(text.splitlines())}: not TOML ({message.removesuffix(' (at end of document)')}): the recipe ends there{hint}"
    if place is None:
        return f"not TOML: {message}{hint}"
    what, line, column = place[1], int(place[2]), place[3]
    return f"line {line}, column {column}: not TOML ({what}): {text.split(chr(10))[line - 1].strip()[:SHOWN_CHARACTERS]}{hint}"


def _near_files(path: Path) -> str:
    """Return which recipe was probably meant: a close name beside ``path``, or the same name in recipes/."""
    if os.path.isdir(path):  # not path.is_dir(), which fails on a name that is too long
        found = sorted(path.glob("*.toml"))
        return f'; give a recipe in it, for example "{found[0]}"' if found else ""
    files = {
        file.name: file
        for folder in (Path("recipes"), path.parent)
        if os.path.isdir(folder)
        for file in folder.glob("*.toml")
        if file != path
    }
    near = closest(f"{path.stem}.toml", files, likeness=0.7)  # the ending, which all share, is a third of a short name
    return f'; did you mean "{files[near]}"?' if near else ""
