"""The [data] table: from data files to encoded training and held-out rows, and what stands in the way of training on them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from qlite.data.check import describe, describe_weights, nothing_left, problems, too_short, unweighted
from qlite.data.choose import Cut, cut, hold_out, weighted
from qlite.data.encode import Encoder
from qlite.data.encoding import Feed, Progress, encode_feed, tokenizer_hash
from qlite.data.formats import FormatName
from qlite.data.sources import Source
from qlite.data.store import Rows
from qlite.data.template import find_template
from qlite.errors import DataError
from qlite.hashes import short_hash
from qlite.table import Table

Fault = Literal["long", "untrained", "unended", "control"]


@dataclass(frozen=True)
class Part:
    """The rows of one purpose, training or testing, and what happened on the way to them."""

    rows: Rows
    cut: Cut
    key: str
    identity: str
    """Hash of its files' content and of how it is read."""
    paths: tuple[str, ...] = ()
    """Its sources, as they are called now."""
    dropped: int = 0
    """Rows left out for being equal to a held-out one, or for overlapping it."""

    @property
    def meta(self) -> dict:
        """What the encoding pass noted: sources, files, rows left out."""
        return self.cut.rows.store.meta

    @property
    def read(self) -> int:
        """Rows read from all sources."""
        return sum(source["rows"] for source in self.meta["sources"])


@dataclass(frozen=True)
class DataSet:
    """What a run trains and is tested on."""

    train: Rows
    test: Rows
    encoder: Encoder
    parts: list[Part]
    """How they came about: the training source, and the test source if it is one of its own."""
    problems: list[str] = field(default_factory=list)
    """Why the recipe would not be trained: each with key, rows and fix."""

    def require_sound(self) -> None:
        """Raise DataError, with all of them, if there are problems."""
        if self.problems:
            look = "Look at them before a weight is loaded: python -m qlite.preview RECIPE"
            raise DataError("\n".join([*self.problems, look]))

    @property
    def system(self) -> str:
        """The system message, if every training row has the same one."""
        return self.parts[0].meta["system"]

    def question(self, index: int) -> str:
        """Return what the user says last in test row ``index``, to be shown."""
        row = self.test[index]
        known = self.test.store.meta["examples"].get(str(int(self.test.row[index])))
        return self.encoder.decode(row.ids[: row.answer_start]) if known is None else known

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of what the rows and prompts depend on; a run that goes on must find the same."""
        own = {"data.template": short_hash(self.encoder.template or ""), "tokenizer": tokenizer_hash(self.encoder.tokenizer)}
        return {part.key: part.identity for part in self.parts} | own


@dataclass(frozen=True, kw_only=True)
class Data(Table):
    """The rows to learn and the held-out rows to measure with."""

    train: str | tuple[Source, ...]
    """Training rows: a file (.jsonl, .json, .csv, .parquet, .txt), a folder, a pattern, or a hub data set "org/name"; or [[data.train]]."""
    test: str | tuple[Source, ...] | None = None
    """Held-out rows, from sources of the same kinds."""
    held_out_rows: Annotated[int, Field(ge=0)] = 0
    """Rows taken from the training rows to be held out, where there is no test source: by a hash, the same on every machine."""
    split: str = "train"
    """Split of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    format: Literal["auto", FormatName] = "auto"
    """Schema of the rows; "auto" looks at the first ones and says what it found."""
    columns: dict[str, str] = field(default_factory=dict)
    """What the data calls our fields: { messages = "turns", content = "utterance", input = "instances.0.input", prompt = "{a}: {b}" }."""
    roles: dict[str, str] = field(default_factory=dict)
    """What the data calls the speakers: { assistant = "SYSTEM" }."""
    separator: str | None = None
    """In .txt files: each line is a row, cut at this into prompt and completion."""
    system: str = ""
    """System message of conversations that have none."""
    template: str = "auto"
    """Chat template: the tokenizer's own ("auto"), a built-in one ("alpaca", "chatml", "plain"), or a .jinja file."""
    loss_on: Literal["answers", "last", "all"] = "answers"
    """What is trained of a conversation: all the assistant's turns, the last one, or every token."""
    long_rows: Literal["drop", "cut_start", "cut_end"] = "drop"
    """A conversation longer than train.tokens is left out, or loses its start or its end."""
    stride: Annotated[int, Field(ge=1)] | None = None
    """Raw text longer than train.tokens is split into windows that begin so many tokens apart; by default they do not overlap."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """A row that does not fit its format stops the run, or is left out and counted."""
    allow: tuple[Fault, ...] = ()
    """What would stop the run but may be: "long" rows (over 1 %), "untrained" rows, "unended" answers, "control" tokens in the text."""

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """Return what turns conversations into ids.

        Raises:
            DataError: the recipe's template cannot be had.
        """
        return Encoder(tokenizer, find_template(self.template, tokenizer), self.loss_on)

    def sources(self, key: str) -> tuple[Source, ...]:
        """Return the sources of ``key``, "train" or "test", each with what the table says for all of them."""
        given = getattr(self, key)
        sources = (Source(path=given),) if isinstance(given, str) else given
        shared = {"split": self.split, "revision": self.revision, "separator": self.separator, "columns": self.columns, "roles": self.roles}
        shared["format"] = None if self.format == "auto" else self.format
        return tuple(replace(s, **{name: value for name, value in shared.items() if getattr(s, name) is None}) for s in sources)

    def load(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tokens: int,
        note: Callable[[str], None],
        progress: Progress = lambda *_: None,
        encoder: Encoder | None = None,
    ) -> DataSet:
        """Return all rows encoded, none longer than ``tokens``; by ``encoder`` if one is given, as a finished run has it.

        Raises:
            DataError: a source, a row or the template cannot be used, or nothing is left to train on.
        """
        encoder = encoder or self.encoder(tokenizer)
        train = self._part("train", encoder, tokens, progress)
        parts, found = [train], problems(train, self, encoder, tokens)
        if self.test:
            test = self._part("test", encoder, tokens, progress)
            parts.append(test)
            found += problems(test, self, encoder, tokens)
            rows, held = train.rows, test.rows
        else:
            if self.held_out_rows >= len(train.rows):
                raise DataError(f"data.held_out_rows = {self.held_out_rows}: there are only {len(train.rows)} rows in all; lower it")
            split = hold_out(train.rows, self.held_out_rows)
            rows, held = split.train, split.held
            parts = [replace(train, dropped=split.dropped)]
        if train.rows.store.is_text.all():
            encoder = Encoder(tokenizer, None, self.loss_on)  # such a run is asked as it was trained: with text to go on with
        weights = [source.weight for source in self.sources("train")]
        rows, before = weighted(rows, weights), rows
        found += unweighted(before, rows, weights, parts[0])
        if not len(rows):
            raise DataError("data.train: what is held out and the weights of its sources leave no row to train on; change them")
        data = DataSet(rows, held, encoder, parts, found)
        for line in [*describe(data), *describe_weights(before, rows, weights, parts[0])]:
            note(line)
        return data

    def _part(self, key: str, encoder: Encoder, tokens: int, progress: Progress) -> Part:
        sources = self.sources(key)
        feed = Feed(sources, f"data.{key}", self.system, self.bad_rows == "skip")
        store = encode_feed(feed, encoder, progress)
        if not len(store.length):
            raise DataError(nothing_left(f"data.{key}", store.meta))
        rows = cut(store, tokens, self.long_rows, self.stride)
        if self.stride is not None and not store.is_text.any():
            raise DataError(f"data.stride = {self.stride}: only raw text is split into windows, and data.{key} has none; remove it")
        if not len(rows.rows):
            raise DataError(too_short(f"data.{key}", store, tokens))
        return Part(rows.rows, rows, f"data.{key}", feed.identity, tuple(source.path for source in sources))
