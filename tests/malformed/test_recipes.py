"""Recipes that are TOML and mean nothing that could be trained: keys, values, paths, sizes, and what only the model shows."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qlite.methods.lora import LoRA
from qlite.recipe.read import MOST_RECIPE_BYTES, read_recipe
from tests.malformed import Case, count_refused
from tests.recipe.test_read import GOOD, MALFORMED, MALFORMED_FILES, MALFORMED_OVERRIDES, replaced
from tests.tiny import tiny_llama


def written(text: str | bytes, folder: Path, overrides: tuple[str, ...] = (), name: str = "my.toml") -> Callable[[], object]:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return partial(read_recipe, path, list(overrides))


def with_keys(text: str, *overrides: str) -> Callable[[Path], Callable[[], object]]:
    return partial(written, text, overrides=overrides)


# Name, what is given, what the message says.
FILES = {
    "nothing but NUL": (with_keys("\0" * 100), "not TOML"),
    "UTF-16": (partial(written, GOOD.encode("utf-16")), "byte 0: not UTF-8"),
    "Latin-1": (partial(written, b"# Z\xfcrich\n"), "byte 3: not UTF-8"),
    "10 MB of comments": (with_keys(GOOD + "# x\n" * 2_500_000), "it has 9.54 MiB, and at most 64.0 KiB"),
    "10 MB of keys": (with_keys(GOOD + "".join(f"k{number} = 1\n" for number in range(700_000))), "at most 64.0 KiB"),
    "as many keys as fit": (with_keys((GOOD + "".join(f"k{n}=1\n" for n in range(40_000)))[: MOST_RECIPE_BYTES - 9] + "\n"), "no such key"),
    "one key of 60 kB": (with_keys(GOOD + "k" * 60_000 + " = 1\n"), "no such key"),
    "a text of 60 kB": (with_keys(GOOD + f'bits = "{"x" * 60_000}"\n'), "no such key"),
    "lists 1,000 deep": (with_keys(GOOD + f"x = {'[' * 1000}{']' * 1000}\n"), "brackets are nested too deeply"),
    "lists 60,000 deep and open": (with_keys(GOOD + f"x = {'[' * 60_000}"), "brackets are nested too deeply"),
    "inline tables 1,000 deep": (with_keys(GOOD + f"x = {'{a=' * 1000}1{'}' * 1000}\n"), "brackets are nested too deeply"),
    "a dotted key of 1,000 parts": (with_keys(GOOD + f"x{'.a' * 1000} = 1\n"), "a key of more than 100 parts"),
    "a dotted key of 50 parts": (with_keys(GOOD + f"x{'.a' * 50} = 1\n"), "train.x = {a = {a = {a = ...}}}: no such key"),
    "a dotted key of 30,000 parts": (
        with_keys(GOOD + f"x{'.a' * 30_000} = 1\n"),
        "line 9: not TOML that can be read: a key of more than 100 parts",
    ),
    "a table of 5,000 names": (with_keys(GOOD + f"[{'a.' * 5000}a]\n"), "a key of more than 100 parts"),
    "5,000 tables": (with_keys(GOOD + "".join(f"[t{number}]\n" for number in range(5000))), "no such table"),
    "a thousand digits too many": (with_keys(GOOD + f"seed = {'9' * 5000}\n"), "Exceeds the limit"),
    "a number beyond all floats": (with_keys(replaced("optimizer", "lr = 1e999")), "optimizer.lr = inf"),
    "YAML": (with_keys("base:\n  model: x\n"), "line 1, column 5: not TOML"),
    "JSON": (with_keys('{"base": {"model": "x"}}'), "line 1, column 1: not TOML"),
    "a Git conflict": (with_keys(GOOD + "<<<<<<< HEAD\nseed = 1\n=======\n"), "line 9, column 1: not TOML"),
    "curly quotes": (with_keys(GOOD.replace('"some/model"', "\u201csome/model\u201d")), "line 2, column 9: not TOML"),
    "escape codes in a key": (with_keys(GOOD + '"\\u001b[31m" = 1\n'), "no such key"),
    "escape codes in a value": (with_keys(replaced("base", 'bits = "\\u001b[2J"')), "base.bits"),
    "a right-to-left mark in a key": (with_keys(GOOD + '"\\u202erank" = 1\n'), "no such key"),
}
NUL = "no file's name holds a NUL byte"
PATHS = {
    "NUL in base.model": (with_keys(replaced("base", 'model = "a\\u0000b"')), 'base.model = "a\\u0000b": ' + NUL),
    "NUL in data.train": (with_keys(replaced("data", 'train = "a\\u0000b.jsonl"')), 'data.train = "a\\u0000b.jsonl": ' + NUL),
    "NUL in data.test": (with_keys(replaced("data", 'test = "a\\u0000b.jsonl"')), 'data.test = "a\\u0000b.jsonl": ' + NUL),
    "NUL in a source": (with_keys(replaced("data", 'train = [{path = "\\u0000"}]')), 'data.train[1].path = "\\u0000": ' + NUL),
    "NUL in data.template": (with_keys(replaced("data", 'template = "\\u0000.jinja"')), 'data.template = "\\u0000.jinja": ' + NUL),
    "NUL in output.dir": (with_keys(replaced("output", 'dir = "a\\u0000b"')), 'output.dir = "a\\u0000b": ' + NUL),
    "bytes that are no text in output.dir": (with_keys(GOOD, "output.dir=a\udcff"), "holds bytes that are not UTF-8"),
    "bytes that are no text in a name": (with_keys(GOOD, "data.\udcff=a"), "holds bytes that are not UTF-8"),
    "bytes that are no text in the recipe's own name": (
        partial(written, GOOD, name=os.fsdecode(b"a\xff.toml")),
        'output.dir = "runs/a\\udcff": holds bytes that are not UTF-8',
    ),
}  # fmt: skip


def missing(name: str) -> Callable[[Path], Callable[[], object]]:
    return lambda folder: partial(read_recipe, folder / name)


def made(make: Callable[[Path], object]) -> Callable[[Path], Callable[[], object]]:
    """Return what makes something else than a file at the recipe's place."""

    def give(folder: Path) -> Callable[[], object]:
        make(folder / "my.toml")
        return partial(read_recipe, folder / "my.toml")

    return give


PLACES = {
    "no such file": (missing("my.toml"), "my.toml: cannot read the recipe (No such file or directory)"),
    "no such folder": (missing("nowhere/my.toml"), "cannot read the recipe (No such file or directory)"),
    "a name with NUL": (missing("a\0b.toml"), "cannot read the recipe (no file's name holds a NUL byte)"),
    "a name with a line break": (missing("a\nb.toml"), "cannot read the recipe (No such file"),
    "a name with escape codes": (missing("a\x1b[31mb.toml"), "a\\x1b[31mb.toml: cannot read the recipe"),
    "a name of 5,000 characters": (missing("a" * 2000 + ".toml"), "cannot read the recipe (File name too long)"),
    "a home of nobody": (missing("~nobody-of-that-name/my.toml"), "cannot read the recipe (No such file"),
    "a folder": (made(Path.mkdir), "cannot read the recipe (Is a directory)"),
    "a pipe": (made(os.mkfifo), "cannot read the recipe (it is a named pipe, and only regular files are read)"),
    "a device without an end": (made(lambda path: path.symlink_to("/dev/zero")), "it is a device, and only regular files are read"),
    "a device without content": (made(lambda path: path.symlink_to("/dev/null")), "it is a device, and only regular files are read"),
    "a link to itself": (made(lambda path: path.symlink_to(path)), "Too many levels of symbolic links"),
    "a link to nothing": (made(lambda path: path.symlink_to("gone.toml")), "cannot read the recipe (No such file"),
    "a file as a folder": (
        lambda folder: ((folder / "my").write_text(""), partial(read_recipe, folder / "my" / "my.toml"))[1],
        "cannot read the recipe (Not a directory)",
    ),
}


def attached(**method: object) -> Callable[[Path], Callable[[], object]]:
    return lambda folder: lambda: LoRA(**method).attach(tiny_llama())


# What only the model shows. tiny_llama is 64 wide, with 2 blocks of 7 linears.
WIDE = "model.layers.0.self_attn.q_proj"
FIT = {
    "more rank than the layers have": (attached(rank=65), f"method.rank = 65: is more than {WIDE} can have (64)"),
    "more rank than the narrowest layers have": (attached(rank=33), "method.rank = 33: is more than"),
    "a rank beyond all memory": (attached(rank=10**15), "is more than"),
    "a rank of one layer beyond it": (attached(rank_per_target={"down_proj": 65}), "method.rank = 65: is more than"),
    "a target that is not there": (attached(targets=("q_prj",)), 'no linear layer is called "q_prj"; did you mean "q_proj"?'),
    "targets of which one is not there": (attached(targets=("q_proj", "wq")), 'no linear layer is called "wq"; this model has: '),
    "a pattern that matches nothing": (attached(targets=("model.layers.9.*",)), 'no linear layer is called "model.layers.9.*"'),
    "a target that is no linear": (attached(targets=("embed_tokens",)), 'no linear layer is called "embed_tokens"'),
    "a target in capitals": (attached(targets=("Q_PROJ",)), 'no linear layer is called "Q_PROJ"'),
    "an empty target": (attached(targets=("",)), 'no linear layer is called ""'),
    "an open bracket as a target": (attached(targets=("[",)), 'no linear layer is called "["'),
    "a target of 100,000 stars": (attached(targets=("*" * 100_000 + "x",)), "no linear layer is called"),
    "a target with escape codes": (attached(targets=("\x1b[2J",)), 'no linear layer is called "\\x1b[2J"'),
    "a rank for a layer that is no target": (
        attached(targets=("q_proj",), rank_per_target={"up_proj": 4}),
        'method.rank_per_target: "up_proj" matches none of the 2 target layers',
    ),
}  # fmt: skip


def cases() -> list[Case]:
    keys = [
        Case(f"{number} {table}.{line[:60]}", with_keys(replaced(table, line)), ("my.toml: ", expected))
        for number, (table, line, expected) in enumerate(MALFORMED)
    ]
    files = [Case(f"file {n}", with_keys(text), ("my.toml: ", *expected)) for n, (text, expected) in enumerate(MALFORMED_FILES)]
    overrides = [Case(f"override {text!r}", with_keys(GOOD, text), ("my.toml: ", said)) for text, said in MALFORMED_OVERRIDES]
    groups = (FILES, PATHS, PLACES, FIT)
    return [*keys, *files, *overrides, *(Case(name, give, (said,)) for group in groups for name, (give, said) in group.items())]


def test_every_recipe_that_cannot_be_trained_is_refused(tmp_path, record_property):
    found = cases()
    assert len(found) == 193
    count_refused("recipes", found, tmp_path, record_property)


def test_a_home_that_is_there_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "my.toml").write_text(replaced("output", 'dir = "~/runs"'), encoding="utf-8")
    assert read_recipe(tmp_path / "my.toml").with_absolute_paths().output.dir == str(tmp_path / "runs")
