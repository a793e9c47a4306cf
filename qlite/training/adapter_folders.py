"""The adapters that a command line names: finished runs and PEFT's folders, what is in them, and whether two are of one base."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qlite.errors import AdapterError, QliteError, shown
from qlite.formats.foreign import ForeignAdapter, read_foreign_adapter
from qlite.formats.peft import CONFIG
from qlite.methods.low_rank import LowRank
from qlite.serving.bank import BASE
from qlite.training.run_folder import RunFolder, find_run

SAME = {"base.model": "base model", "tokenizer": "tokenizer"}
"""What in a run's data.json has to be the same in all, and what it is called."""


@dataclass(frozen=True)
class Given:
    """An adapter as the command line names it: a finished run, or a folder in PEFT's format."""

    name: str
    path: Path
    run: RunFolder | None

    @property
    def folder(self) -> Path:
        """Where its two files are."""
        return self.run.adapter if self.run else self.path

    @cached_property
    def adapter(self) -> ForeignAdapter:
        """What is in the files, read when it is asked for. Raises AdapterError."""
        return read_foreign_adapter(self.folder)


def parse_adapters(texts: list[str]) -> tuple[list[Given], list[str]]:
    """Return the adapters that ``texts`` name, and what is wrong with the others."""
    found: list[Given] = []
    problems, names = [], set()
    for text in texts:
        name, is_named, folder = text.partition("=")
        told = f"--adapter {shown(text)}"
        if not (name and is_named and folder):
            problems.append(f"{told}: write NAME=FOLDER, for example a=runs/a")
        elif name == BASE:
            problems.append(f'{told}: "{BASE}" is the model without any adapter; choose another name')
        elif name in names:
            problems.append(f'{told}: the name "{shown(name)}" is given twice; choose another')
        else:
            try:
                found.append(Given(name, Path(folder), run_at(Path(folder))))
            except QliteError as error:
                problems.append(f"{told}: {error}")
        names.add(name)
    return found, problems


def run_at(folder: Path) -> RunFolder | None:
    """Return the finished run in ``folder``; None if it is a folder in PEFT's format.

    Raises:
        QliteError: it is neither, or not finished.
    """
    if (folder / "recipe.toml").is_file():
        return find_run(str(folder))
    if not folder.is_dir():
        raise AdapterError(f'there is no folder "{folder}"')
    if not (folder / CONFIG).is_file():
        raise AdapterError(f'"{folder}" is neither the folder of a run (it has no recipe.toml) nor of a PEFT adapter (it has no {CONFIG})')
    return None


def read_updates(given: Given, problems: list[str]) -> dict[str, LowRank]:
    """Return what ``given`` does to each linear; where it cannot be read, nothing, and ``problems`` has one more."""
    try:
        return given.adapter.updates(given.folder)
    except AdapterError as error:
        problems.append(str(error))
        return {}


def other_base(given: Given, base: RunFolder | None) -> list[str]:
    """Return in what a run was trained on something else than ``base`` was; of PEFT's folders nobody knows."""
    if given.run is None or base is None:
        return []
    own, others = given.run.identity, base.identity
    return [
        f"{given.name}: was trained on another {what} than {base.path}: {_named(given.run, key)}, not {_named(base, key)}"
        for key, what in SAME.items()
        if key in own and key in others and own[key] != others[key]
    ]


def other_template(given: Given, base: RunFolder | None) -> list[str]:
    """Return whether a run was trained with another chat template than ``base``, in words, with the files that hold them."""
    if given.run is None or base is None or given.run.template == base.template:
        return []
    ways = [f'"{run.path / "template.jinja"}"' if run.template is not None else "none" for run in (given.run, base)]
    return [f"{given.name}: was trained with another chat template than {base.path}: {ways[0]}, not {ways[1]}"]


def _named(run: RunFolder, key: str) -> str:
    return f'"{shown(run.recipe().base.model)}" ({run.identity[key][:8]})'
