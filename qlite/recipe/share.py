"""What of a recipe others may read: all its keys, but no folder of the machine on which it ran."""

import dataclasses
import os
import re
from contextlib import suppress
from pathlib import Path

from qlite.data.sources import Source
from qlite.files import cache_folder
from qlite.recipe.schema import Recipe

# What begins with a slash, "~", a drive's letter or "..", as no hub id does.
LOCAL = re.compile(r"[/\\~]|\.\.?[/\\]|[A-Za-z]:[/\\]")


def shareable(recipe: Recipe) -> Recipe:
    """Return ``recipe`` with every local path cut to its last name."""
    data = {key: _named_sources(value) for key in ("train", "test") if (value := getattr(recipe.data, key))}
    return dataclasses.replace(
        recipe,
        base=dataclasses.replace(recipe.base, model=local_name(recipe.base.model)),
        data=dataclasses.replace(recipe.data, template=local_name(recipe.data.template), **data),
        output=dataclasses.replace(recipe.output, dir=re.split(r"[/\\]", recipe.output.dir.rstrip("/\\"))[-1]),
    )


def local_name(value: str) -> str:
    """Return the last name in a local path; what is no local path, as a hub id, stays."""
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if LOCAL.match(value) else value


def without_folders(text: str, recipe: Recipe) -> str:
    """Return ``text`` without the names of folders in which the run was at home: of its files, its user, its cache."""
    for folder in _folders(recipe):
        # The folder with a separator behind it, or alone, but for the relative ones: ".." is also a part of sentences.
        end = r"(?:[/\\]+|(?![\w.-]))" if os.path.isabs(folder) else r"[/\\]+"
        for written in {folder, folder.replace("\\", "\\\\")}:  # as it is, and as JSON or TOML has it
            text = re.sub(rf"(?<![\w.-]){re.escape(written)}{end}", "", text)
    return text


def _folders(recipe: Recipe) -> list[str]:
    """Return the folders of the recipe's local paths and those of this machine, the longest first."""
    paths = [recipe.base.model, recipe.data.template, os.path.abspath(recipe.output.dir)]
    for given in (recipe.data.train, recipe.data.test):
        paths += [given] if isinstance(given, str) else [source.path for source in given or ()]
    found = {os.path.dirname(path.rstrip("/\\")) for path in paths if os.path.isabs(path)}
    found |= {str(folder) for folder in (Path.home(), Path.cwd(), cache_folder().absolute())}
    found = {folder for folder in found if folder.strip("/\\")}
    for folder in list(found):
        with suppress(ValueError):  # it is on another drive
            found.add(os.path.relpath(folder))  # as messages have it
    return sorted(found - {os.curdir}, key=len, reverse=True)


def _named_sources(given: str | tuple[Source, ...]) -> str | tuple[Source, ...]:
    if isinstance(given, str):
        return local_name(given)
    return tuple(dataclasses.replace(source, path=local_name(source.path)) for source in given)
