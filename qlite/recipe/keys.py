"""Every key a recipe can have, in words: ``python -m qlite.train --keys``, and what an error says a key takes."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from pydantic import TypeAdapter
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from qlite.methods import METHODS
from qlite.recipe.schema import TABLES

INTRODUCTION = (
    "Every key of a recipe, with its default and what it takes. train.steps is the key steps in the table [train]. "
    "On the command line, after the recipe: train.steps=20, or train.steps=none to leave it out."
)

SEVERAL = 'In a list of several, name = ["lora", "prefix"], each has its keys in a table of its own: [method.lora].'
"""Is said of method.name, once."""


@dataclass(frozen=True)
class Key:
    """One key of a recipe, as --keys shows it."""

    name: str
    takes: str
    """Type and bounds in words: "a whole number, 1 or more"."""
    default: str | None
    """As TOML has it; None where leaving the key out is no value ("none") or not allowed."""
    must_be_given: bool
    text: str


def print_keys() -> None:
    """Print all keys, table by table, at any width."""
    console = Console(highlight=False)
    console.print(Text(INTRODUCTION))
    previous = ""
    for key in all_keys():
        table = key.name.lstrip("[").partition(".")[0]
        if table != previous:
            console.print(Text.assemble("\n", (f"[{table}]", "bold"), f"  {summary(TABLES[table])}"))
        previous = table
        default = "" if key.default is None else f" = {key.default}"
        absent = "" if key.default is not None else "; must be given" if key.must_be_given else "; none by default"
        head = Text.assemble((key.name, "cyan"), default, (f"   {key.takes.removeprefix('a ')}{absent}", "dim"))
        console.print(Padding(head, (0, 0, 0, 2), expand=False))
        console.print(Padding(Text(key.text), (0, 0, 0, 6), expand=False))


def all_keys() -> Iterator[Key]:
    """Yield every key of every table, in the order of a recipe; [method] once for each method there is."""
    for table, cls in TABLES.items():
        for variant in METHODS.values() if table == "method" else [cls]:
            yield from table_keys(table, variant)


def table_keys(table: str, cls: type) -> Iterator[Key]:
    """Yield the keys of ``table`` as ``cls`` reads it."""
    if table == "method":
        takes = f"{one_of(METHODS)}, or a list of several"
        is_first = cls is next(iter(METHODS.values()))
        yield Key("method.name", takes, toml_value(cls.name), False, f"{summary(cls)} {SEVERAL}" if is_first else summary(cls))
    yield from _keys_of(table, table_schema(cls))


def _keys_of(table: str, schema: dict) -> Iterator[Key]:
    required = schema.get("required", ())
    for name, entry in schema["properties"].items():
        value = entry.get("default", {})  # only a table's default is made by a function, which the schema does not show
        default = None if name in required or value is None else toml_value(value)
        yield Key(f"{table}.{name}", describe(entry), default, name in required, " ".join(entry.get("description", "").split()))
        # The keys of a table in a list, once: data.test takes the same as data.train.
        if (inner := table_in_list(schema, entry)) and name in required:
            yield from _keys_of(f"[[{table}.{name}]]", inner)


def table_in_list(schema: dict, entry: dict) -> dict | None:
    """Return the schema of the tables that ``entry`` takes a list of ([[data.train]]), or None if it takes none."""
    names = [part["items"]["$ref"].rpartition("/")[2] for part in entry.get("anyOf", ()) if "$ref" in part.get("items", ())]
    return schema["$defs"][names[0]] if names else None


@functools.cache
def table_adapter(cls: type) -> TypeAdapter:
    """Return pydantic's reader of a table; kept, because making one takes milliseconds."""
    return TypeAdapter(cls)


@functools.cache
def table_schema(cls: type) -> dict:
    """Return what ``cls`` takes as a JSON schema; not to be changed."""
    return table_adapter(cls).json_schema()


def summary(cls: type) -> str:
    """Return the first sentence of a table's docstring."""
    return cls.__doc__.strip().splitlines()[0].partition(". ")[0].removesuffix(".") + "."


def describe(entry: dict, plural: bool = False) -> str:
    """Return what a JSON schema's ``entry`` takes, in words: "a whole number, 1 or more"."""
    if "words" in entry:
        return entry["words"]
    if "enum" in entry:
        return one_of(entry["enum"])
    if "$ref" in entry:
        return "tables"
    if "anyOf" in entry:
        return " or ".join(describe(part, plural) for part in entry["anyOf"] if part.get("type") != "null")
    if entry["type"] == "array":
        parts = entry.get("prefixItems") or [entry["items"]]
        count = f"{len(parts)} " if "prefixItems" in entry else ""
        return f"a list of {count}{describe(parts[0], plural=True)}"
    if entry["type"] == "object":
        return f"a table of {describe(entry['additionalProperties'], plural=True)}"
    names = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
    name = names[entry["type"]]
    return ", ".join([f"{name.removeprefix('a ')}s" if plural else name, *_bounds(entry)])


def _bounds(entry: dict) -> list[str]:
    low = [
        f"{entry[key]} or more" if key == "minimum" else f"more than {entry[key]}"
        for key in ("minimum", "exclusiveMinimum")
        if key in entry
    ]
    high = [
        f"{entry[key]} or less" if key == "maximum" else f"less than {entry[key]}"
        for key in ("maximum", "exclusiveMaximum")
        if key in entry
    ]
    return [" and ".join(low + high)] if low or high else []


def one_of(names: object) -> str:
    """Return the choices as "a", "b" or "c"."""
    *most, last = [toml_value(name) for name in names]
    return f"{', '.join(most)} or {last}" if most else last


def toml_value(value: object) -> str:
    """Return ``value`` on one line as a recipe would have it."""
    if isinstance(value, int) and value.bit_length() > 64:
        return hex(value)  # Python refuses to write very long decimals
    if isinstance(value, dict | list | tuple):
        return _nested(value)
    if isinstance(value, str | bool | int):
        return json.dumps(value, ensure_ascii=False)
    return "none" if value is None else str(value)  # a number, a date or a time


def _nested(value: dict | list | tuple, levels: int = 3) -> str:
    if not levels:
        return "..."
    parts = value.values() if isinstance(value, dict) else value
    texts = [_nested(part, levels - 1) if isinstance(part, dict | list) else toml_value(part) for part in parts]
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml_key(key)} = {text}' for key, text in zip(value, texts, strict=True))}}}"
    return f"[{', '.join(texts)}]"


def toml_key(key: str) -> str:
    """Return one part of a key as a recipe would have it: in quotes where it is more than letters, digits, - and _."""
    return key if key.isascii() and key.replace("-", "_").isidentifier() else json.dumps(key, ensure_ascii=False)


def closest(word: str, known: object, likeness: float = 0.6) -> str | None:
    """Return the one of ``known`` that ``word`` was probably meant to be, if it is at least that like it (0 to 1)."""
    close = get_close_matches(word.lower(), list(known), n=1, cutoff=likeness)
    return close[0] if close else None
