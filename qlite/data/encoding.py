"""From sources to a store of encoded rows: read, told apart, rendered, tokenised, in batches and in flat memory; kept by content.

While the tokenizers library works on one batch on all cores, without Python's lock, this module's threads read and render the next.
"""

import heapq
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlite.data.encode import Encoded, Encoder, texts_of
from qlite.data.formats import Conversation, Reading, detect_format, unread_mapping
from qlite.data.rows import Row
from qlite.data.sources import Source, fingerprint, read_rows, source_bytes, source_files
from qlite.data.store import META, StoreWriter, TokenStore, writing_store
from qlite.errors import DataError
from qlite.files import cache_folder, drop_oldest, mark_used
from qlite.hashes import code_hash, short_hash
from qlite.units import GIB

Progress = Callable[[str, int, int], None]
CACHE_BYTES = 20 * GIB
BATCH_ROWS, BATCH_CHARACTERS = 512, 2**22
THREADS = 2
DETECTED_ROWS = 8
"""First rows of a source that its format is told from."""
EXAMPLES = 32
"""Rows whose question is kept as text, to be shown beside the model's answer."""
NAMED = 5
"""Rows that a message names at most."""


@dataclass(frozen=True)
class Feed:
    """Which rows are read, and how."""

    sources: tuple[Source, ...]
    key: str
    """The recipe's key, for messages: "data.train"."""
    system: str = ""
    """System message of conversations that have none."""
    skip_bad: bool = False
    """Leave out rows that do not fit their format, instead of stopping at the first."""

    @cached_property
    def identity(self) -> str:
        """A hash of the files' content and of how it is read.

        Raises:
            DataError: a source cannot be read.
        """
        read = [[fingerprint(source, self.key), source.format, source.columns, source.roles] for source in self.sources]
        return short_hash(json.dumps([read, self.system, self.skip_bad], sort_keys=True))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return short_hash(f"{content}{json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)}")


def encode_feed(feed: Feed, encoder: Encoder, progress: Progress) -> TokenStore:
    """Return ``feed``'s rows encoded, from the cache if they were encoded before.

    Raises:
        DataError: a source or a row cannot be used.
        MachineError: the cache folder cannot be written.
    """
    before = _stamps(feed)  # before the files are hashed: what is read must be what was hashed
    parts = [feed.identity, encoder.template, encoder.loss_on, tokenizer_hash(encoder.tokenizer), _code_hash()]
    folder = cache_folder() / "encoded" / short_hash(json.dumps(parts))
    if (folder / META).is_file():
        mark_used(folder)
    else:
        with writing_store(folder) as (writer, meta):
            encoding = _Encoding(feed, encoder, writer, progress)
            encoding.run()
            meta |= encoding.facts()
            changed = [str(path) for path, stamp in _stamps(feed).items() if before.get(path) != stamp]
            if changed:
                raise DataError(f'{feed.key}: "{changed[0]}" has changed while it was read; run again when it is written')
        drop_oldest(folder.parent, CACHE_BYTES, keep=folder)
    return TokenStore(folder)


def _code_hash() -> str:
    """Return a hash of what turns rows into ids, ours and the libraries': rows encoded by other code are encoded anew."""
    return code_hash([Path(__file__).parent], ("tokenizers", "transformers", "pyarrow", "datasets"))


def _stamps(feed: Feed) -> dict[Path, tuple[int, int]]:
    """Return size and time of change of every file that is read."""
    files = [path for source in feed.sources for path in source_files(source, feed.key)]
    return {path: ((stat := path.stat()).st_size, stat.st_mtime_ns) for path in files}


def read_conversations(
    source: Source, key: str, told: Callable[[int], None] = lambda _: None
) -> tuple[Reading, Iterator[tuple[Row, Conversation | DataError]]]:
    """Return how ``source`` is read, and its rows, each with what it says or why it does not fit that format.

    ``told`` hears how many bytes of its files are read.

    Raises:
        DataError: the source cannot be read, or its first rows are in no known format.
    """
    rows = read_rows(source, key, told)
    first = list(islice(rows, DETECTED_ROWS))
    columns = source.columns or {}
    try:
        reading = Reading(source.format or detect_format(first, columns), columns, source.roles or {})
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    return reading, ((row, _read(reading, row, key)) for row in chain(first, rows))


def unread_mappings(readings: list[Reading]) -> list[str]:
    """Return which mappings no source had a use for, and why: what they were meant to bring in is missing."""
    # One that the table has for all sources need not be of use to each.
    found = {entry for reading in readings for entry in reading.found}
    unread = {entry: why for reading in readings for entry, why in unread_mapping(reading).items() if entry not in found}
    columns = {entry for reading in readings for entry in reading.columns.items()}  # "system" is a column's name and a role's
    tables = {entry: "columns" if entry in columns else "roles" for entry in unread}
    return [f'data.{tables[entry]}.{entry[0]} = "{entry[1]}": {why}' for entry, why in unread.items()]


def _read(reading: Reading, row: Row, key: str) -> Conversation | DataError:
    try:
        return reading.to_conversation(row)
    except DataError as error:
        return DataError(f"{key}: {error}")


@dataclass
class Left:
    """Rows that something is the matter with: how many, and the first ones: where they stand, or what is wrong with them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(where)


@dataclass(frozen=True)
class _Item:
    """One row on its way through a batch."""

    row: Row
    source: int
    conversation: Conversation

    @property
    def characters(self) -> int:
        """About how long its texts are when they are rendered, for each answer from the beginning, twice."""
        size = sum(len(text) for text in texts_of([self.conversation.messages, self.conversation.tools]))
        return size * max(1, 2 * len(self.conversation.answers))

    @property
    def may_end_anyhow(self) -> bool:
        """Raw text may go on in the next row, and a tool call ends with a token of its own."""
        return self.conversation.is_text or any("tool_calls" in message for message in self.conversation.messages)


class _Encoding:
    """One pass over a feed's rows into a store."""

    def __init__(self, feed: Feed, encoder: Encoder, writer: StoreWriter, progress: Progress):
        self.feed, self.encoder, self.writer, self.progress = feed, encoder, writer, progress
        self.sources: list[dict] = []
        self.files: dict[tuple[str, str], int] = {}
        self.left = {name: Left() for name in ("bad", "untrained", "unended", "control", "split")}
        self.systems: set[str] = set()
        self.first_examples: dict[int, str] = {}
        self.random_examples: list[tuple[int, int, str]] = []  # a heap: the rows of the smallest digests
        self.total = sum(source_bytes(source, feed.key) for source in feed.sources)

    def run(self) -> None:
        waiting: deque[Future] = deque()
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                for batch in self._batches():
                    waiting.append(pool.submit(self._encode, batch))
                    while len(waiting) > THREADS:
                        self._write(waiting.popleft().result())
                while waiting:
                    self._write(waiting.popleft().result())
            finally:
                for future in waiting:
                    future.cancel()

    def facts(self) -> dict:
        """Return what is worth knowing of the pass, for the store's meta.json."""
        return {
            "sources": self.sources,
            "files": [list(key) for key in self.files],
            "left": {name: asdict(left) for name, left in self.left.items()},
            "system": next(iter(self.systems)) if len(self.systems) == 1 else "",
            "examples": {str(row): text for row, text in [*self.first_examples.items(), *(item[1:] for item in self.random_examples)]},
        }

    # Reading, in the calling thread

    def _batches(self) -> Iterator[list[_Item]]:
        batch: list[_Item] = []
        size = 0
        for item in self._items():
            batch.append(item)
            size += item.characters
            if len(batch) == BATCH_ROWS or size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _items(self) -> Iterator[_Item]:
        before, readings = 0, []
        for index, source in enumerate(self.feed.sources):
            key = f"{self.feed.key}[{index + 1}]" if len(self.feed.sources) > 1 else self.feed.key
            reading, rows = read_conversations(source, key, partial(self._tell, before))
            readings.append(reading)
            facts = {"format": reading.format, "is_detected": source.format is None, "rows": 0}
            self.sources.append(facts)
            for row, conversation in rows:
                facts["rows"] += 1
                if not isinstance(conversation, DataError):
                    yield _Item(row, index, conversation.with_system(self.feed.system))
                elif self.feed.skip_bad:
                    self.left["bad"].add(str(conversation))
                else:
                    raise conversation
            before += source_bytes(source, self.feed.key)
        self._tell(self.total, 0)
        if unread := unread_mappings(readings):
            raise DataError("\n".join(f"{line}; mend it, or remove it" for line in unread))

    def _tell(self, before: int, done: int) -> None:
        if self.total:
            self.progress("read and encode", before + done, self.total)

    # Encoding, in the pool's threads

    def _encode(self, batch: list[_Item]) -> list[tuple[_Item, list[Encoded] | DataError, str | None]]:
        """Return each item with its rows, or why there are none, and a control token in its text, if there is one."""
        encoded = self._encode_all(batch)
        return [(item, rows, self.encoder.control_token(item.conversation)) for item, rows in zip(batch, encoded, strict=True)]

    def _encode_all(self, batch: list[_Item]) -> list[list[Encoded] | DataError]:
        try:
            return self.encoder.encode_many([item.conversation for item in batch], [item.row.where for item in batch])
        except DataError as error:
            if not self.feed.skip_bad:
                raise
            return [self._encode_all([item])[0] for item in batch] if len(batch) > 1 else [error]

    # Writing, in the calling thread

    def _write(self, batch: list[tuple[_Item, list[Encoded] | DataError, str | None]]) -> None:
        for item, rows, control in batch:
            where = item.row.where
            if isinstance(rows, DataError):
                self.left["bad"].add(str(rows))
            elif not any(row.trained_tokens for row in rows):
                self.left["untrained"].add(where)
            else:
                if control is not None:
                    self.left["control"].add(f"{where} ({control})")
                if len(rows) > 1:
                    self.left["split"].add(where)
                if not item.may_end_anyhow and not all(self.encoder.is_ended(row) for row in rows):
                    self.left["unended"].add(where)
                for row in rows:
                    self._write_row(item, row)
        if not self.total:  # a hub data set: nobody knows how much there is
            self.progress("encode rows", len(self.writer), 0)

    def _write_row(self, item: _Item, row: Encoded) -> None:
        index = len(self.writer)
        file = self.files.setdefault((item.row.file, item.row.unit), len(self.files))
        digest = self.writer.add(row, item.source, file, item.row.number)
        first, *_ = messages = item.conversation.messages
        if len(self.systems) < 2:
            self.systems.add(first["content"] if first["role"] == "system" else "")
        asked = next((message["content"] for message in reversed(messages) if message["role"] != "assistant"), "")
        if len(self.first_examples) < EXAMPLES:
            self.first_examples[index] = asked
        # A heap's top is its smallest: with the sign turned, the largest digest of those kept.
        push = heapq.heappush if len(self.random_examples) < EXAMPLES else heapq.heappushpop
        push(self.random_examples, (-digest, index, asked))
