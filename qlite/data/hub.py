"""Rows of a data set of the Hugging Face hub, through ``datasets``: memory-mapped once downloaded, or streamed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from qlite.data.blocks import shown
from qlite.data.rows import Row
from qlite.errors import DataError

REASON_CHARACTERS = 300


@dataclass(frozen=True)
class HubData:
    """Which part of which version of a data set."""

    id: str
    name: str | None
    """Configuration (subset); None: the only one, or the one its owner made the default."""
    split: str
    revision: str | None
    """Branch, tag or commit; None: the main branch."""
    stream: bool
    """Read over the network row by row, instead of downloading all of it first."""


def hub_rows(hub: HubData) -> Iterator[Row]:
    """Yield the rows of ``hub``, counted from 1 within the split or slice.

    Raises:
        DataError: there is no such data set, configuration, split or revision, or the hub cannot be reached.
    """
    if hub.stream and "[" in hub.split:
        raise DataError(f'split = "{hub.split}": a slice cannot be streamed; give rows = N for the first N, or remove stream')
    builder, number = _builder(hub), 0
    try:
        if hub.stream:
            rows = builder.as_streaming_dataset(split=hub.split)
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=hub.split)
        for number, fields in enumerate(rows, start=1):
            yield Row(fields, hub.id, number, "row")
    except Exception as error:  # as in _builder
        raise _problem(hub, error, f" after row {number}" if number else "") from error


def hub_commit(hub: HubData) -> str:
    """Return the commit that ``hub`` means now.

    Raises:
        DataError: as ``hub_rows``.
    """
    return str(_builder(hub).hash)


def _builder(hub: HubData):
    from datasets import load_dataset_builder  # slow to import, and only hub data needs it

    try:
        builder = load_dataset_builder(hub.id, hub.name, revision=hub.revision)
    except Exception as error:  # the library, the hub's and the HTTP client raise dozens of types with no root in common
        raise _problem(hub, error) from error
    # Without the network, the library takes the newest version it has on this disk, whatever revision was asked for.
    if builder.name == "cache" and hub.revision is not None and hub.revision != builder.hash:
        raise DataError(
            f'revision = "{hub.revision}": the hub cannot be reached, and of "{hub.id}" this machine has only {builder.hash}; '
            "connect to the network, or give that commit"
        )
    return builder


def _problem(hub: HubData, error: Exception, after: str = "") -> DataError:
    """Return what the library's exception means for the user."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    message = " ".join(str(error).split()) or type(error).__name__
    reason = shown(message, REASON_CHARACTERS)
    listed = re.search(r"(Should be one of|Available splits:|Available:|available configs:) \[([^\]]*)\]", message)
    if listed:
        is_split = listed[1] in ("Should be one of", "Available splits:")
        key, sort, wanted = ("split", "split", re.sub(r"\[.*", "", hub.split)) if is_split else ("name", "configuration", hub.name or "")
        there = re.findall(r"'([^']*)'", listed[2])
        near = get_close_matches(wanted, there, n=1)
        meant = f'; did you mean "{near[0]}"?' if near else ""
        have = ", ".join(f'"{name}"' for name in there) or "none"
        return DataError(f'{key} = "{wanted}": "{hub.id}" has no such {sort}; it has {have}{meant}')
    if message.startswith("Unrecognized instruction format"):
        return DataError(f'split = "{hub.split}": is no split or slice; write for example "train", "train[:5%]" or "train[100:200]"')
    if "Revision" in reason and isinstance(error, DatasetNotFoundError):
        return DataError(f'revision = "{hub.revision}": "{hub.id}" has no such branch, tag or commit')
    if isinstance(error, DataFilesNotFoundError):
        return DataError(f'"{hub.id}" holds no file that datasets can read: {reason}')
    if isinstance(error, DatasetNotFoundError):
        return DataError(f'"{hub.id}": {reason} Check the spelling; if it is private or asks for consent, run `hf auth login`')
    if "scripts are no longer supported" in reason:
        return DataError(f'"{hub.id}" is a program and not data; try revision = "refs/convert/parquet", where the hub keeps its rows')
    return DataError(
        f'cannot load "{hub.id}" (split "{hub.split}"){after}: {reason}; check network and disk, or download it and give its folder'
    )
