"""The conformance files of TOML 1.0: what is invalid is refused with its line or byte, what is valid is read to the same values."""

import datetime
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qlite.recipe.read import parse_toml, read_recipe
from tests.data.data_files import shared
from tests.malformed import Case, count_refused

LIST = "toml_test/tests/files-toml-1.0.0"


def files(sort: str) -> list[Path]:
    """Return the .toml files of ``sort``, "valid" or "invalid"."""
    names = shared(LIST).read_text(encoding="utf-8").splitlines()
    return [shared(LIST).parent / name for name in names if name.startswith(f"{sort}/") and name.endswith(".toml")]


def give(source: Path, folder: Path) -> Callable[[], object]:
    path = folder / "my.toml"
    path.write_bytes(source.read_bytes())
    return partial(read_recipe, path)


def cases() -> list[Case]:
    # Bytes that are not UTF-8 are a UnicodeDecodeError to Python, and no error of its TOML reader.
    place = r"/my\.toml: (line \d+(, column \d+)?: not TOML|byte \d+: not UTF-8)"
    return [Case(path.as_posix().partition("invalid/")[2], partial(give, path), pattern=place) for path in files("invalid")]


def test_every_invalid_file_is_refused_with_its_place(tmp_path, record_property):
    found = cases()
    assert len(found) == 499
    count_refused("TOML", found, tmp_path, record_property)


READERS = {
    "string": str,
    "integer": int,
    "float": float,
    "bool": lambda text: text == "true",
    "datetime": datetime.datetime.fromisoformat,
    "datetime-local": datetime.datetime.fromisoformat,
    "date-local": datetime.date.fromisoformat,
    "time-local": datetime.time.fromisoformat,
}


def untagged(expected: object) -> object:
    """Return what the suite's JSON means: {"type": "integer", "value": "3"} is 3."""
    if isinstance(expected, list):
        return [untagged(part) for part in expected]
    if set(expected) == {"type", "value"} and isinstance(expected["type"], str):
        return READERS[expected["type"]](expected["value"])
    return {key: untagged(part) for key, part in expected.items()}


def test_every_valid_file_is_read_to_the_values_and_types_it_has(record_property):
    equal = 0
    for path in files("valid"):
        expected = untagged(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        # repr: 1 is not 1.0, nan is nan, and -0.0 is not 0.0.
        found = repr(by_name(parse_toml(path)))
        assert found == repr(by_name(expected)), path
        equal += 1
    assert equal == 210
    record_property("figure", f"valid TOML: read {equal}/{equal}")


def by_name(value: object) -> object:
    """Return ``value`` with the keys of its tables sorted."""
    if isinstance(value, dict):
        return {key: by_name(value[key]) for key in sorted(value)}
    return [by_name(part) for part in value] if isinstance(value, list) else value
