"""From sources to a store of encoded rows: read, told apart, rendered, tokenised, in batches and in flat memory; kept by content.

While the tokenizers library works on one batch on all cores, without Python's lock, this module's threads read and render the next.
"""

import hashlib
import heapq
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import chain, islice

from transformers import PreTrainedTokenizerBase

from qlite.data.encode import Encoded, Encoder
from qlite.data.formats import Conversation, Reading, detect_format
from qlite.data.rows import Row
from qlite.data.sources import Source, fingerprint, read_rows, source_bytes
from qlite.data.store import META, StoreWriter, TokenStore, writing_store
from qlite.errors import DataError
from qlite.files import cache_folder, drop_oldest, mark_used
from qlite.units import GIB

Progress = Callable[[str, int, int], None]
# Changed whenever the same rows would be encoded into other ids or another table.
ENCODING = 1
CACHE_BYTES = 20 * GIB
BATCH_ROWS, BATCH_CHARACTERS = 512, 2**21
THREADS = 2
DETECTED_ROWS = 8
"""First rows of a source that its format is told from."""
EXAMPLES = 32
"""Rows whose question is kept as text, to be shown beside the model's answer."""
NAMED = 5
"""Rows that a message names at most."""


@dataclass(frozen=True)
class Feed:
    """All that decides which ids come out, but the model's own tokenizer and template."""

    sources: tuple[Source, ...]
    key: str
    """The recipe's key, for messages: "data.train"."""
    system: str = ""
    """System message of conversations that have none."""
    skip_bad: bool = False
    """Leave out rows that do not fit their format, instead of stopping at the first."""

    def identity(self, encoder: Encoder) -> str:
        """Return a hash of the files' content, how they are read, the template and the tokenizer: the same ids come out.

        Raises:
            DataError: a source cannot be read.
        """
        parts = {
            "encoding": ENCODING,
            "sources": [[fingerprint(source, self.key), source.format, source.columns, source.roles] for source in self.sources],
            "feed": [self.system, self.skip_bad],
            "template": encoder.template,
            "loss_on": encoder.loss_on,
            "tokenizer": tokenizer_hash(encoder.tokenizer),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of all that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{content}{json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)}".encode()).hexdigest()


def encode_feed(feed: Feed, encoder: Encoder, progress: Progress) -> tuple[TokenStore, str]:
    """Return ``feed``'s rows encoded, from the cache if they were encoded before, and their identity.

    Raises:
        DataError: a source or a row cannot be used.
        MachineError: the cache folder cannot be written.
    """
    identity = feed.identity(encoder)
    # Another release of these may tokenise otherwise; a run that goes on is told of it by its run.json.
    libraries = "-".join(version(name) for name in ("tokenizers", "transformers"))
    folder = cache_folder() / "encoded" / f"{identity}-{libraries}"
    if (folder / META).is_file():
        mark_used(folder)
    else:
        with writing_store(folder) as (writer, meta):
            encoding = _Encoding(feed, encoder, writer, progress)
            encoding.run()
            meta |= encoding.facts()
        drop_oldest(folder.parent, CACHE_BYTES)
    return TokenStore(folder), identity


def read_conversations(
    source: Source, key: str, told: Callable[[int], None] = lambda _: None
) -> tuple[str, Iterator[tuple[Row, Conversation | DataError]]]:
    """Return the format of ``source``, and its rows, each with what it says or why it does not fit that format.

    ``told`` hears how many bytes of its files are read.

    Raises:
        DataError: the source cannot be read, or its first rows are in no known format.
    """
    rows = read_rows(source, key, told)
    first = list(islice(rows, DETECTED_ROWS))
    columns = source.columns or {}
    reading = Reading(source.format or detect_format(first, columns), columns, source.roles or {})
    return reading.format, ((row, _read(reading, row)) for row in chain(first, rows))


def _read(reading: Reading, row: Row) -> Conversation | DataError:
    try:
        return reading.to_conversation(row)
    except DataError as error:
        return error


@dataclass
class Left:
    """Rows that something is the matter with: how many, and where the first stand."""

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


class _Encoding:
    """One pass over a feed's rows into a store."""

    def __init__(self, feed: Feed, encoder: Encoder, writer: StoreWriter, progress: Progress):
        self.feed, self.encoder, self.writer, self.progress = feed, encoder, writer, progress
        self.sources: list[dict] = []
        self.files: dict[tuple[str, str], int] = {}
        self.left = {name: Left() for name in ("bad", "untrained", "control", "split")}
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
            size += sum(len(message["content"]) for message in item.conversation.messages)
            if len(batch) == BATCH_ROWS or size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _items(self) -> Iterator[_Item]:
        before = 0
        for index, source in enumerate(self.feed.sources):
            told = partial(self._tell, before)
            format, rows = read_conversations(source, self.feed.key, told)
            facts = {"format": format, "is_detected": source.format is None, "rows": 0}
            self.sources.append(facts)
            for row, conversation in rows:
                facts["rows"] += 1
                if not isinstance(conversation, DataError):
                    yield _Item(row, index, conversation.with_system(self.feed.system))
                elif self.feed.skip_bad:
                    self.left["bad"].add(row.where)
                else:
                    raise conversation
            before += source_bytes(source, self.feed.key)
        self._tell(self.total, 0)

    def _tell(self, before: int, done: int) -> None:
        if self.total:
            self.progress("read and encode", before + done, self.total)

    # Encoding, in the pool's threads

    def _encode(self, batch: list[_Item]) -> list[tuple[_Item, list[Encoded], str | None]]:
        """Return each item with its rows (none where the template refuses it) and a control token in its text, if there is one."""
        encoded = self._encode_all(batch)
        return [(item, rows, self.encoder.control_token(item.conversation)) for item, rows in zip(batch, encoded, strict=True)]

    def _encode_all(self, batch: list[_Item]) -> list[list[Encoded]]:
        try:
            return self.encoder.encode_many([item.conversation for item in batch], [item.row.where for item in batch])
        except DataError:
            if not self.feed.skip_bad:
                raise
            return [self._encode_all([item])[0] for item in batch] if len(batch) > 1 else [[]]

    # Writing, in the calling thread

    def _write(self, batch: list[tuple[_Item, list[Encoded], str | None]]) -> None:
        for item, rows, control in batch:
            where = item.row.where
            if not rows:
                self.left["bad"].add(where)
            elif not any(row.trained_tokens for row in rows):
                self.left["untrained"].add(where)
            else:
                if control is not None:
                    self.left["control"].add(f"{where} ({control})")
                if len(rows) > 1:
                    self.left["split"].add(where)
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
