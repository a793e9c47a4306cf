"""What a model is asked in an evaluation: questions with all the texts that answer them, and choices to be weighed by likelihood."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from qlite.data.encode import Encoded, Encoder
from qlite.data.encoding import Left, Progress, unread_mappings
from qlite.data.encoding import read_conversations as read_rows_as_conversations
from qlite.data.formats import Conversation, Messages
from qlite.data.sources import Source, source_bytes
from qlite.errors import DataError
from qlite.serving.likelihood import Continuation


@dataclass(frozen=True)
class Placed:
    """A conversation and where it stands in the data: "orders.jsonl line 12"."""

    conversation: Conversation
    where: str

    def with_system(self, system: str) -> "Placed":
        """Return the same with ``system`` in front, where the conversation has no system message."""
        return replace(self, conversation=self.conversation.with_system(system))


@dataclass(frozen=True)
class Question:
    """A conversation up to the answer, and every text that the data gives as its answer."""

    where: str
    messages: Messages
    tools: list[dict] | None
    prompt: list[int]
    """The ids that training has before the answer."""
    references: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with ``choices``, each as the ids that would answer it; the token that ends an answer is left off."""

    where: str
    messages: Messages
    choices: tuple[str, ...]
    right: int
    continuations: list[Continuation]


def read_conversations(
    source: Source, key: str, skip_bad: bool, progress: Progress, note: Callable[[str], None] = lambda _: None
) -> Iterator[Placed]:
    """Yield the conversations of ``source``; with ``skip_bad`` those that do not fit its format are left out, and ``note`` says how many.

    Raises:
        DataError: the source or a row cannot be used; with file and line.
    """
    total = source_bytes(source, key)
    left = Left()
    reading, rows = read_rows_as_conversations(source, key, lambda done: progress("read the rows", done, total))
    for row, conversation in rows:
        if not isinstance(conversation, DataError):
            yield Placed(conversation, row.where)
        elif skip_bad:
            left.add(str(conversation))
        else:
            raise conversation
    if left.count:
        note(f"{key}: {left.count:,} rows do not fit their format and are left out, first {left.first[0]}")
    for line in unread_mappings([reading]):
        note(f"{key}: {line}, so it brings nothing in")
    progress("read the rows", total, total)


def encode_rows(talks: Sequence[Placed], encoder: Encoder, tokens: int) -> list[tuple[Encoded, str]]:
    """Return what carries the loss, and where it stands; raw text in pieces of at most ``tokens``."""
    rows = []
    for talk, encoded in zip(talks, _encoded(talks, encoder), strict=True):
        pieces = _pieces(encoded[0], tokens) if talk.conversation.is_text else encoded
        rows += [(piece, talk.where) for piece in pieces]
    return rows


def ask(talks: Sequence[Placed], encoder: Encoder) -> list[Question]:
    """Return a question for each different prompt, in the order of the first time it is asked. Raw text asks nothing.

    The references are the texts of the ids that training has as the answer: what a perfect answer would be read as.
    """
    # What is not to be learnt may still be asked, and encoding would leave its row out.
    asked = [replace(t, conversation=replace(t.conversation, untrained=frozenset())) for t in talks if not t.conversation.is_text]
    questions: dict[tuple[int, ...], Question] = {}
    for talk, encoded in zip(asked, _encoded(asked, encoder), strict=True):
        row, messages = encoded[-1], talk.conversation.messages[:-1]
        prompt = [int(token) for token in row.ids[: row.answer_start]]
        question = questions.setdefault(tuple(prompt), Question(talk.where, messages, talk.conversation.tools, prompt))
        question.references.append(encoder.decode(row.ids[row.answer_start :]).strip())
    return list(questions.values())


def ask_choices(talks: Sequence[Placed], encoder: Encoder) -> list[ChoiceQuestion]:
    """Return the rows with choices.

    Raises:
        DataError: a choice is empty.
    """
    return [_choice_question(talk, encoder) for talk in talks if talk.conversation.choices]


def last_said(messages: Messages) -> str:
    """Return what was said to the assistant last, to be shown."""
    return next((message["content"] for message in reversed(messages) if message["role"] != "assistant"), "")


def _encoded(talks: Sequence[Placed], encoder: Encoder) -> list[list[Encoded]]:
    return encoder.encode_many([talk.conversation for talk in talks], [talk.where for talk in talks])


def _choice_question(one: Placed, encoder: Encoder) -> ChoiceQuestion:
    talk, messages = one.conversation, one.conversation.messages[:-1]
    each = [replace(talk, messages=[*messages, {"role": "assistant", "content": text}], untrained=frozenset()) for text in talk.choices]
    rows = [encoded[-1] for encoded in _encoded([replace(one, conversation=each_talk) for each_talk in each], encoder)]
    continuations = [_continuation(row, set(encoder.stop_ids)) for row in rows]
    if None in continuations:
        raise DataError(
            f"{one.where}: choice {continuations.index(None) + 1} is empty and has no likelihood; write it out, or remove the row"
        )
    return ChoiceQuestion(one.where, messages, talk.choices, talk.right, continuations)


def _continuation(row: Encoded, stop_ids: set[int]) -> Continuation | None:
    ids = [int(token) for token in row.ids]
    while len(ids) > row.answer_start and ids[-1] in stop_ids:
        ids.pop()
    return Continuation(ids[: row.answer_start], ids[row.answer_start :]) if len(ids) > row.answer_start else None


def _pieces(row: Encoded, tokens: int) -> list[Encoded]:
    """Return a raw text's row in pieces; a single token is left out: it has nothing before it that could predict it."""
    starts = range(0, len(row), tokens)
    return [Encoded(row.ids[s : s + tokens], row.trained[s : s + tokens]) for s in starts if len(row) - s > 1]
