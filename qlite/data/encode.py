"""Conversations to token ids, in one place for training, evaluation and generation.

What the model is asked with in generation is, id for id, what it saw before the answer in training: both are made here, by
``_rows``, piece by piece. A piece is what one speaker adds; it is tokenised apart, so no token spans prompt and answer.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from qlite.data.formats import Conversation, Messages
from qlite.data.sandbox import Renderer
from qlite.data.template import TEMPLATES, freeze_date
from qlite.errors import DataError

IGNORED = -100
"""Label of a token that carries no loss."""
ANSWERS, LAST, ALL = "answers", "last", "all"
"""What of a conversation is trained: every turn of the assistant, its last one, or every token."""
# What a template's own code can raise on a conversation that it was not written for.
TEMPLATE_FAULTS = (
    TemplateError,
    SyntaxError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


@dataclass(frozen=True)
class Encoded:
    """One row as token ids, and which of them carry a loss. Lists or arrays of equal length."""

    ids: Sequence[int]
    trained: Sequence[bool]
    answer_start: int = 0
    """Where the last answer begins: what stands before it is what generation asks with."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        return int(np.count_nonzero(self.trained))


@dataclass
class _Pieces:
    """A row in the making: texts and whether they are trained."""

    texts: list[str] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    done: str = ""
    answer_piece: int = 0

    def add(self, text: str, trained: bool) -> None:
        self.texts.append(text)
        self.trained.append(trained)
        self.done += text


class Encoder:
    """Encodes with one tokenizer and one chat template: Jinja text, or None for a model that is only given raw text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, loss_on: str = ANSWERS):
        self.tokenizer, self.template, self.loss_on = tokenizer, template, loss_on
        self._frozen = template and freeze_date(template)
        if tokenizer.eos_token is None:
            raise DataError("base.model: its tokenizer has no end-of-text token, so no answer could ever end")

    def encode(self, conversation: Conversation, where: str = "row") -> list[Encoded]:
        """Return the conversation as one row, or as several where the template rewrites earlier turns (Qwen3's reasoning).

        Raises:
            DataError: the template cannot render these messages.
        """
        return self.encode_many([conversation], [where])[0]

    def encode_many(self, conversations: list[Conversation], wheres: list[str]) -> list[list[Encoded]]:
        """Return ``encode`` of each conversation, tokenised all at once; ``wheres`` name them in messages."""
        talks = [c for c in conversations if not c.is_text]
        prompts, fulls = self._rendered(talks, [w for c, w in zip(conversations, wheres, strict=True) if not c.is_text])
        rows, texts = [], []
        for conversation, where in zip(conversations, wheres, strict=True):
            if conversation.is_text:
                texts.append(conversation)
                rows.append(None)
            else:
                rows.append(self._rows(conversation, prompts, fulls, where))
        encoded = iter(self._tokenised([row for group in rows if group is not None for row in group]))
        raw = iter(self._raw(texts))
        return [[next(raw)] if group is None else [next(encoded) for _ in group] for group in rows]

    def encode_prompt(self, messages: Messages, where: str = "prompt", tools: list[dict] | None = None) -> list[int]:
        """Return the ids that ask for the next assistant turn after ``messages``: those that training has before its answer.

        Without a template the last message is raw text to be continued.
        """
        if self.template is None:
            text = Conversation([{"role": "text", "content": messages[-1]["content"]}], goes_on=True)
            return list(self._raw([text])[0].ids)
        asked = Conversation([*messages, {"role": "assistant", "content": ""}], tools)
        prompts, fulls = self._rendered([asked], [where], is_open=True)
        row = self._rows(asked, prompts, fulls, where, is_open=True)[-1]
        return list(self._tokenised([row])[0].ids)

    def text_of(self, messages: Messages, ask: bool) -> str:
        """Return ``messages`` through the chat template; ``ask``: up to where the next answer begins. Raises DataError: it refuses them."""
        return self._render_one(messages, None, "prompt", ask)

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: end of text, and the one that closes an assistant's turn in this template."""
        stops = {self.tokenizer.eos_token_id}
        if self.template is not None:
            turn = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
            last = int(self.encode(turn, "data.template")[-1].ids[-1])
            if last in self.tokenizer.all_special_ids or last in self.tokenizer.added_tokens_decoder:
                stops.add(last)
        return sorted(stops)

    @property
    def pad_id(self) -> int:
        """The id that fills short rows. Any will do: what is trained is decided by position, never by id."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def control_token(self, conversation: Conversation) -> str | None:
        """Return a token with a meaning to the model (end of turn, ...) that stands in a message as if it were text, or None.

        In raw text they are meant, and so are an answer's own (<think>), but for those that tokenizers call special.
        """
        if conversation.is_text:
            return None
        told = [(self._special if m["role"] == "assistant" else self._control, texts_of(m)) for m in conversation.messages]
        told.append((self._control, texts_of(conversation.tools)))
        return next((found[0] for pattern, texts in told for text in texts if (found := pattern.search(text))), None)

    def is_ended(self, row: Encoded) -> bool:
        """Return whether every answer that is trained ends with a token that generation stops at."""
        trained = np.append(np.asarray(row.trained, bool), False)
        ends = np.flatnonzero(trained[:-1] & ~trained[1:])
        return all(row.ids[end] in self.stop_ids for end in ends.tolist())

    # From a conversation to pieces of text

    def _rendered(self, conversations: list[Conversation], wheres: list[str], is_open: bool = False) -> tuple[dict, dict]:
        """Return, by (conversation's id, answer's index), the text before each answer and the text up to its end.

        ``is_open``: the last answer is not there yet, and so has no end.
        """
        places = [(c, i, w) for c, w in zip(conversations, wheres, strict=True) for i in c.answers]
        if places and self.template is None:
            names = ", ".join(f'"{name}"' for name in TEMPLATES)
            raise DataError(
                "data.template: there is no chat template to write a conversation with: the tokenizer brings none, or the run was trained "
                f"on raw text; choose one of {names} or a .jinja file"
            )
        keys = [(id(c), i) for c, i, _ in places]
        prompts = self._render([(c.messages[:i], c.tools, w) for c, i, w in places], ask=True)
        ended = places[:-1] if is_open else places
        fulls = self._render([(c.messages[: i + 1], c.tools, w) for c, i, w in ended], ask=False)
        return dict(zip(keys, prompts, strict=True)), dict(zip(keys, fulls, strict=False))

    def _render(self, requests: list[tuple[Messages, list | None, str]], ask: bool) -> list[str]:
        return [self._render_one(messages, tools, where, ask) for messages, tools, where in requests]

    def _render_one(self, messages: Messages, tools: list | None, where: str, ask: bool) -> str:
        if tools is not None and "tools" not in self.template:
            raise DataError(f"{where}: the row offers tools, and the chat template has no place for them; choose another data.template")
        try:
            return self._renderer.render(messages, tools, ask, self._tokens)
        except TemplateError as error:
            raise DataError(f"{where}: the chat template refuses this conversation: {error}") from error
        except TEMPLATE_FAULTS as error:
            raise DataError(f"{where}: the chat template fails on this conversation ({type(error).__name__}: {error})") from error

    @cached_property
    def _renderer(self) -> Renderer:
        try:
            return Renderer(self._frozen)
        except TEMPLATE_FAULTS as error:  # one out of a file has been looked at when it was read
            place = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
            why = f"{place}{type(error).__name__ if not str(error) else error}"
            raise DataError(f"base.model: its tokenizer's chat template cannot be rendered ({why}); give data.template") from error

    @cached_property
    def _tokens(self) -> dict[str, str]:
        """The tokens that templates know by name: bos_token and so on."""
        return dict(self.tokenizer.special_tokens_map)

    def _rows(self, conversation: Conversation, prompts: dict, fulls: dict, where: str, is_open: bool = False) -> list[_Pieces]:
        """Return the conversation's rows; ``is_open``: the last answer is not there yet, and its row ends with the question."""
        rows: list[_Pieces] = []
        answers = conversation.answers
        for index in answers:
            key, message = (id(conversation), index), conversation.messages[index]
            if not rows or not prompts[key].startswith(rows[-1].done):
                rows.append(_Pieces())
            row = rows[-1]
            row.add(prompts[key][len(row.done) :], self.loss_on == ALL)
            row.answer_piece = len(row.texts)
            if is_open and index == answers[-1]:
                break
            says = bool(message["content"].strip() or message.get("tool_calls"))
            is_wanted = (self.loss_on != LAST or index == answers[-1]) and index not in conversation.untrained
            row.add(self._answer(message, prompts[key], fulls[key], where), says and is_wanted)
        for message in conversation.messages:
            if message["role"] == "system" and not self._keeps_system:
                raise DataError(f"{where}: the chat template leaves the system's message out; choose another data.template, or drop it")
            if message["role"] != "assistant":
                _require_said(message, rows[-1].done, where)
        return rows if is_open else [row for row in rows if any(row.trained)] or rows[-1:]

    def _answer(self, message: dict, prompt: str, full: str, where: str) -> str:
        """Return what ``message`` adds to ``prompt``, up to and including the token that ends the turn."""
        if not full.startswith(prompt):
            raise DataError(_does_not_continue(prompt, full, where))
        answer, content = full[len(prompt) :], message["content"].strip()
        _require_said(message, answer, where)
        if content and not message.get("tool_calls"):
            # Phi-3 writes another token behind the turn's own, ChatML a line break that opens the next turn: the model stops before them.
            # From the right, because the same words may stand in the reasoning, too, and in the names of tokens.
            said = content if content in answer else content.split()[-1]
            start = answer.rfind(said)
            while start >= 0:
                if end := self._end.match(answer, start + len(said)):
                    return answer[: end.end()]
                start = answer.rfind(said, 0, start + len(said) - 1)
        answer = answer.rstrip()
        return answer if answer.endswith(self._end_tokens) else answer + self.tokenizer.eos_token

    @cached_property
    def _end_tokens(self) -> tuple[str, ...]:
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        return tuple({token for token in [*added, *self.tokenizer.all_special_tokens] if token.strip()})

    @cached_property
    def _end(self) -> re.Pattern:
        """White space and a token that may end a turn."""
        return re.compile(rf"\s*(?:{_any_of(self._end_tokens).pattern})")

    @cached_property
    def _keeps_system(self) -> bool:
        """Whether the template writes system messages out: a short one could stand in its text by chance."""
        rare = "7c0ffee7"
        rendered = self._probe([{"role": "system", "content": rare}, {"role": "user", "content": "a"}])
        return rendered is None or rare in rendered

    def _probe(self, messages: Messages) -> str | None:
        """Return ``messages`` rendered, None where the template refuses them: a row like them will say why."""
        with suppress(*TEMPLATE_FAULTS):
            return self._renderer.render(messages, None, False, self._tokens)
        return None

    @cached_property
    def _special(self) -> re.Pattern:
        return _any_of(self.tokenizer.all_special_tokens)

    @cached_property
    def _control(self) -> re.Pattern:
        written = [token for token in self._end_tokens if token in (self.template or "")]
        return _any_of([*self.tokenizer.all_special_tokens, *written])

    # From pieces of text to ids

    def _tokenised(self, rows: list[_Pieces]) -> list[Encoded]:
        firsts = iter(self._ids([row.texts[0] for row in rows]))
        others = iter(self._continued([text for row in rows for text in row.texts[1:]]))
        encoded = []
        for row in rows:
            pieces = [next(firsts), *(next(others) for _ in row.texts[1:])]
            ids = [token for piece in pieces for token in piece]
            trained = [flag for piece, flag in zip(pieces, row.trained, strict=True) for _ in piece]
            encoded.append(Encoded(ids, trained, sum(len(piece) for piece in pieces[: row.answer_piece])))
        return encoded

    def _raw(self, conversations: list[Conversation]) -> list[Encoded]:
        begin, end, rows = self.tokenizer.bos_token or "", self.tokenizer.eos_token_id, []
        texts = [conversation.messages[0]["content"] for conversation in conversations]
        # A beginning-of-text token that is written out is the one that the tokenizer would add.
        own = [text.removeprefix(begin) if self.begins_with_token else text for text in texts]
        for conversation, text, ids in zip(conversations, texts, self._ids(own, special=True), strict=True):
            ids = ids[:-1] if ids[-1:] == [end] else ids  # some tokenizers add it themselves
            ids = ids if conversation.goes_on else [*ids, end]
            rows.append(Encoded(ids, [bool(text.strip())] * len(ids)))
        return rows

    @cached_property
    def begins_with_token(self) -> bool:
        """Whether the tokenizer puts a beginning-of-text token before raw text."""
        return self._ids(["a"], special=True)[0][0] == self.tokenizer.bos_token_id

    def _continued(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of texts that follow another one."""
        if not self._prefixes_space:
            return self._ids(texts)
        # Behind a line break such a tokenizer adds no space of its own; the break's ids are taken off again.
        line_break = self._ids(["\n"])[0]
        count = len(line_break)
        behind = self._ids(["\n" + text for text in texts])
        return [ids[count:] if ids[:count] == line_break else self._ids([text])[0] for ids, text in zip(behind, texts, strict=True)]

    @cached_property
    def _prefixes_space(self) -> bool:
        """Whether the tokenizer puts a space before every text it is given (Llama 2, Mistral): wrong in mid-conversation."""
        alone, behind, line_break = self._ids(["a", "\na", "\n"])
        return behind[len(line_break) :] != alone

    def _ids(self, texts: list[str], special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False)[
            "input_ids"
        ]


def _any_of(tokens: Iterable[str]) -> re.Pattern:
    """Return a pattern of ``tokens``, the longest first; white space is no token."""
    return re.compile("|".join(map(re.escape, sorted({token for token in tokens if token.strip()}, key=len, reverse=True))))


def texts_of(value: object) -> Iterator[str]:
    """Yield all texts inside messages or tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_of(part)


def _require_said(message: dict, text: str, where: str) -> None:
    """Raise DataError if the template has left out of ``text`` what ``message`` says, reasons or calls."""
    functions = [call.get("function", call) for call in message.get("tool_calls", ())]
    calls = [function["name"] for function in functions]
    written = [text for function in functions for text in texts_of(function.get("arguments"))]
    reasoning = message.get("reasoning_content") or message.get("thinking") or ""
    parts = [("message", message["content"]), ("reasoning", reasoning), *(("argument of a call", said) for said in written)]
    missing = [name for name in calls if text.count(name) < calls.count(name)]
    if missing:
        raise DataError(f"{where}: the chat template leaves a call of {missing[0]} out; choose another data.template, or drop it")
    for what, said in parts:
        if said.strip() not in text and _squeezed(said) not in _squeezed(text) and json.dumps(said)[1:-1] not in text:
            raise DataError(
                f"{where}: the chat template leaves the {message['role']}'s {what} out; choose another data.template, or drop it"
            )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _does_not_continue(prompt: str, full: str, where: str) -> str:
    same = next((index for index, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    return (
        f"{where}: the chat template asks for an answer with {prompt[same:][:40]!r} and writes {full[same:][:40]!r} there when it has one, "
        "so nothing that is learnt would be asked for; give another data.template, for example a .jinja file in which both are the same"
    )
