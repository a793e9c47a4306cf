"""Encoded rows on disk: all token ids in one memory-mapped file, and a table with a line for each row.

A token that carries a loss is stored as its id, one that carries none as the id's complement (-1 - id).
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors.numpy import load_file

from qlite.data.encode import Encoded
from qlite.files import new_file, new_folder, write_json, write_tensors

TOKENS, TABLE, META = "tokens.i32", "rows.safetensors", "meta.json"
# Column -> type code of array.array: lengths, trained tokens and places in tokens; digest: 8 bytes of a hash of the row's ids.
COLUMNS = {"length": "i", "trained": "i", "answer": "i", "source": "i", "file": "i", "number": "q", "digest": "q"}


class StoreWriter:
    """Takes rows in; holds only their lines of the table in memory."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._columns = {name: array(code) for name, code in COLUMNS.items()}

    def __len__(self) -> int:
        return len(self._columns["length"])

    def add(self, row: Encoded, source: int, file: int, number: int) -> int:
        """Append one row, of line ``number`` of file ``file`` of source ``source``; return its digest."""
        ids = np.asarray(row.ids, np.int32)
        trained = np.asarray(row.trained, bool)
        digest = int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little", signed=True)
        self._stream.write(np.where(trained, ids, ~ids).tobytes())
        values = (len(ids), int(trained.sum()), row.answer_start, source, file, number, digest)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
        return digest

    def table(self) -> dict[str, torch.Tensor]:
        """Return the table, a tensor for each column."""
        return {name: torch.from_numpy(np.frombuffer(column, column.typecode).copy()) for name, column in self._columns.items()}


@contextmanager
def writing_store(folder: Path) -> Iterator[tuple[StoreWriter, dict]]:
    """Give a writer and a dictionary for facts; on leaving, the whole store appears as ``folder``.

    Raises:
        MachineError: the disk does not take it.
    """
    with new_folder(folder) as temporary:
        meta: dict = {}
        with new_file(temporary / TOKENS) as stream:
            writer = StoreWriter(stream)
            yield writer, meta
        write_tensors(temporary / TABLE, writer.table())
        write_json(temporary / META, meta)


class TokenStore:
    """A finished store. Only what is asked for is read from disk."""

    def __init__(self, folder: Path):
        self.meta: dict = json.loads((folder / META).read_text(encoding="utf-8"))
        table = load_file(folder / TABLE)
        self.length, self.trained, self.answer = table["length"], table["trained"], table["answer"]
        self.source, self.file, self.number, self.digest = table["source"], table["file"], table["number"], table["digest"]
        self.start = np.concatenate([[0], np.cumsum(self.length, dtype=np.int64)])
        self.tokens = np.memmap(folder / TOKENS, np.int32, "r") if len(self.length) else np.zeros(0, np.int32)

    @cached_property
    def is_text(self) -> np.ndarray:
        """Which rows are raw text."""
        return np.array([source["format"] == "text" for source in self.meta["sources"]], bool)[self.source]

    def where(self, row: int) -> str:
        """Return the row's file and line, for messages."""
        name, unit = self.meta["files"][self.file[row]]
        return f"{name} {unit} {self.number[row]}"


@dataclass(frozen=True)
class Rows(Sequence[Encoded]):
    """Stretches of a store's rows, as a sequence of encoded rows: whole rows, shortened ones, or windows of long texts.

    All are arrays of one length: ``row`` in the store; ``start`` and ``stop`` in it, in tokens; ``context``: how many of the first
    tokens carry no loss because the window before has trained them.
    """

    store: TokenStore
    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    context: np.ndarray

    @classmethod
    def whole(cls, store: TokenStore, rows: np.ndarray) -> "Rows":
        """Return the store's ``rows`` as they are."""
        nothing = np.zeros(len(rows), np.int32)
        return cls(store, rows, nothing, store.length[rows], nothing)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: int) -> Encoded:
        row, start, stop = self.row[index], int(self.start[index]), int(self.stop[index])
        first = int(self.store.start[row])
        stored = np.asarray(self.store.tokens[first + start : first + stop])
        trained = stored >= 0
        ids = np.where(trained, stored, ~stored)
        trained[: self.context[index]] = False
        return Encoded(ids, trained, max(0, int(self.store.answer[row]) - start))

    def take(self, which: np.ndarray) -> "Rows":
        """Return the rows at ``which`` (indices, or a mask)."""
        return Rows(self.store, self.row[which], self.start[which], self.stop[which], self.context[which])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return self.stop - self.start

    @property
    def digests(self) -> np.ndarray:
        """A number for each row that is the same for rows of the same tokens, and as good as random. int64."""
        return self.store.digest[self.row] ^ (self.start.astype(np.int64) * -7046029254386353131)

    def where(self, index: int) -> str:
        return self.store.where(self.row[index])

    @property
    def trained_counts(self) -> np.ndarray:
        """Tokens of each row that carry a loss."""
        whole, counts = self.store.length[self.row], self.store.trained[self.row].astype(np.int64)
        is_part = (self.context > 0) | (self.start > 0) | (self.stop < whole)
        is_all = counts == whole
        counts[is_part & is_all] = (self.lengths - self.context)[is_part & is_all]
        for index in np.flatnonzero(is_part & ~is_all):
            counts[index] = self[index].trained_tokens
        return counts
