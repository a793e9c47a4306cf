"""The adapters that a command line names: finished runs and PEFT's folders, what is in them, and whether two are of one base."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qlite.errors import AdapterError, QliteError, shown
from qlite.formats.foreign import ForeignAdapter, read_foreign_adapter
from qlite.formats.foreign_prompts import ForeignPrompts, read_foreign_prompts
from qlite.formats.peft import CONFIG, WEIGHTS
from qlite.hashes import sha256
from qlite.methods.adalora import AdaLoRA
from qlite.methods.lora import LoRA
from qlite.methods.low_rank import LowRank
from qlite.methods.relora import ReLoRA
from qlite.serving.bank import BASE
from qlite.training.provenance import read_provenance, said_identity
from qlite.training.run_folder import RunFolder, find_run

UPDATES = (LoRA, AdaLoRA, ReLoRA)
"""Methods that add B A to linears, and may do more beside."""
BASE_KEYS = {"base.model": "base model", "tokenizer": "tokenizer"}
TEMPLATE_KEYS = {"data.template": "chat template"}
"""What of what adapters were trained with has to be the same in all, and what it is called."""


@dataclass(frozen=True)
class Given:
    """An adapter as the command line names it: a finished run, or a folder in PEFT's format."""

    name: str
    path: Path
    run: RunFolder | None

    @property
    def folder(self) -> Path:
        """Where its two files are."""
        return self.run.peft_adapter if self.run else self.path

    @cached_property
    def adapter(self) -> ForeignAdapter:
        """What is in the files, read when it is asked for. Raises AdapterError."""
        if self.run and not isinstance(method := self.run.recipe().method, UPDATES):
            raise AdapterError(
                f"{self.path}: its method is {method.words}, and only low-rank updates stand beside others, are added up or swapped; "
                f"by itself it answers: python -m qlite.generate {self.path}"
            )
        return read_foreign_adapter(self.folder)

    @cached_property
    def prompts(self) -> ForeignPrompts | None:
        """What is in the files of a PEFT folder whose type changes no weight; None of any other. Raises AdapterError."""
        return None if self.run else read_foreign_prompts(self.folder)

    @property
    def stands_alone(self) -> bool:
        """Whether it does more than low-rank updates of linears, so that no other can stand beside it. Raises AdapterError."""
        return self.run is None and (self.prompts is not None or self.adapter.is_more_than_updates)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Hashes of what it was trained with: as the run says, or as the file itself does where qlite has written it."""
        return self.run.identity if self.run else said_identity(read_provenance(self.path))

    @property
    def sha256(self) -> str:
        """Hash of the file that a merge's record names: a run's own, which is not always what PEFT reads."""
        return sha256((self.run.adapter if self.run else self.path) / WEIGHTS)

    @property
    def base_name(self) -> str:
        """The base as the run's recipe or the adapter's config names it."""
        try:
            return self.run.recipe().base.model if self.run else (self.prompts or self.adapter).base_name or "unknown"
        except AdapterError:  # which is told where its tensors are asked for
            return "unknown"


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


def contradictions(given: list[Given], keys: dict[str, str]) -> list[str]:
    """Return where adapters were trained with another of ``keys`` than the first that says it; who says nothing may be of the same."""
    found = []
    for key, what in keys.items():
        first, *others = [each for each in given if key in each.identity] or [None]
        found += [
            f"{each.name}: was trained {'with' if keys is TEMPLATE_KEYS else 'on'} another {what} than {first.path}: "
            f"{_named(each, key)}, not {_named(first, key)}"
            for each in others
            if each.identity[key] != first.identity[key]
        ]
    return found


def _named(given: Given, key: str) -> str:
    if key in TEMPLATE_KEYS:
        path = given.run.path / "template.jinja" if given.run else given.path / "chat_template.jinja"
        return f'"{path}"' if path.is_file() else given.identity[key][:8]
    return f'"{shown(given.base_name)}" ({given.identity[key][:8]})'
