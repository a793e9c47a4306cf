"""The [data] table: from a data file to encoded training and held-out rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from qlite.data.encode import Encoded, Encoder
from qlite.data.formats import Messages, detect_format, to_messages
from qlite.data.rows import Row, read_rows
from qlite.errors import DataError
from qlite.table import Table


@dataclass(frozen=True)
class DataSet:
    """What a run trains and is tested on."""

    train: list[Encoded]
    test: list[Encoded]
    test_messages: list[Messages]
    """The held-out conversations as text, for comparing answers."""
    encoder: Encoder
    system: str = ""
    """The system message, if every training row has the same one."""


@dataclass(frozen=True, kw_only=True)
class Data(Table):
    """The rows to learn and the held-out rows to measure with."""

    train: str
    """Training rows: a .jsonl or .json file, or a hub data set "org/name"."""
    test: str | None = None
    """Held-out rows, from a source of the same kinds."""
    held_out_rows: Annotated[int, Field(ge=0)] = 0
    """Rows taken off the end of the training rows to be held out, where there is no test source."""
    split: str = "train"
    """Split of a hub data set."""
    format: Literal["auto", "messages", "prompt", "alpaca", "text"] = "auto"
    """Schema of the rows; "auto" looks at the first one."""
    template: Literal["auto", "alpaca", "chatml", "plain"] = "auto"
    """Chat template: the tokenizer's own ("auto") or a built-in one, for base models that have none."""

    def load(self, tokenizer: PreTrainedTokenizerBase, tokens: int, note: Callable[[str], None]) -> DataSet:
        """Return all rows encoded, those longer than ``tokens`` left out.

        Raises:
            DataError: a source, a row or the template cannot be used, or nothing is left to train on.
        """
        encoder = Encoder(tokenizer, self.template)
        rows = read_rows(self.train, self.split, "data.train")
        test_rows = read_rows(self.test, self.split, "data.test") if self.test else []
        if self.held_out_rows >= len(rows):
            raise DataError(f"data.held_out_rows = {self.held_out_rows}: {self.train} has only {len(rows)} rows; lower it")
        if self.held_out_rows:
            rows, test_rows = rows[: -self.held_out_rows], rows[-self.held_out_rows :]
        format = detect_format(rows[0]) if self.format == "auto" else self.format
        train, spoken = self._encode(rows, format, encoder, tokens, note)
        test, messages = self._encode(test_rows, format, encoder, tokens, note)
        if not train:
            raise DataError(f"train.tokens = {tokens}: {self.train} has no row with an answer that is that short; raise it")
        if test_rows and not test:
            raise DataError(f"train.tokens = {tokens}: no held-out row with an answer is that short; raise it")
        note(f'data: {len(train)} training rows in format "{format}", {len(test)} held out; {_share(train)}')
        return DataSet(train, test, messages, encoder, _common_system(spoken))

    def _encode(self, rows: list[Row], format: str, encoder: Encoder, tokens: int, note) -> tuple[list[Encoded], list[Messages]]:
        kept, messages, too_long, empty = [], [], 0, []
        for row in rows:
            conversation = to_messages(row, format)
            if not conversation[-1]["content"].strip():
                empty.append(row.where)
                continue
            encoded = encoder.encode(conversation, row.where)
            if format == "text":
                kept += [piece for piece in _pieces(encoded, tokens) if len(piece) > 1]
            elif len(encoded) > tokens:
                too_long += 1
            else:
                kept.append(encoded)
                messages.append(conversation)
        if empty:
            note(f"data: {len(empty)} of {len(rows)} rows have an empty answer and are left out, first {empty[0]}")
        if too_long:
            note(f"data: {too_long} of {len(rows)} rows are longer than train.tokens = {tokens} and are left out")
        return kept, messages


def _common_system(conversations: list[Messages]) -> str:
    firsts = {m[0]["content"] if m[0]["role"] == "system" else "" for m in conversations}
    return firsts.pop() if len(firsts) == 1 else ""


def _pieces(encoded: Encoded, tokens: int) -> list[Encoded]:
    """Return a raw text cut into pieces of at most ``tokens`` ids."""
    starts = range(0, len(encoded), tokens)
    return [Encoded(encoded.ids[s : s + tokens], encoded.trained[s : s + tokens]) for s in starts]


def _share(rows: list[Encoded]) -> str:
    total, trained = sum(len(row) for row in rows), sum(row.trained_tokens for row in rows)
    return f"{total / len(rows):.0f} tokens a row, {trained / total:.0%} of them trained"
