"""Conversations to token ids, in one place for training, evaluation and generation.

What the model is asked with in generation is, id for id, what it saw before the answer in training.
"""

from dataclasses import dataclass
from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qlite.data.formats import Messages
from qlite.data.template import TEMPLATES
from qlite.errors import DataError

IGNORED = -100
"""Label of a token that carries no loss."""


@dataclass(frozen=True)
class Encoded:
    """One conversation as token ids, and which of them carry a loss."""

    ids: list[int]
    trained: list[bool]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        return sum(self.trained)


class Encoder:
    """Encodes with one tokenizer and one chat template (the tokenizer's own, or one of TEMPLATES by name)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "auto"):
        self.tokenizer = tokenizer
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        self.template = own if template == "auto" else TEMPLATES[template]
        if not self.template:
            names = ", ".join(f'"{name}"' for name in TEMPLATES)
            raise DataError(f'data.template: this tokenizer brings no chat template, so "auto" finds none; choose one of {names}')
        if tokenizer.eos_token is None:
            raise DataError("base.model: its tokenizer has no end-of-text token, so no answer could ever end")

    def encode(self, messages: Messages, where: str = "row") -> Encoded:
        """Return the conversation's ids; the assistant's turns, with the token that ends each, are trained.

        Raises:
            DataError: the template cannot render these messages turn by turn.
        """
        if messages[0]["role"] == "text":
            return self._encode_text(messages[0]["content"])
        ids: list[int] = []
        trained: list[bool] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], where, ask=True)
            answer = self._answer(prompt, messages[: index + 1], where)
            self._extend(ids, trained, done, prompt, where, train=False)
            self._extend(ids, trained, prompt, prompt + answer, where, train=True)
            done = prompt + answer
        return Encoded(ids, trained)

    def encode_prompt(self, messages: Messages, where: str = "prompt") -> list[int]:
        """Return the ids that ask for the next assistant turn after ``messages``: history encoded as ``encode`` does."""
        answered = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        past = self.encode(messages[: answered + 1], where) if answered >= 0 else Encoded([], [])
        ids, trained = list(past.ids), list(past.trained)
        prompt = self._render(messages, where, ask=True)
        done = ""
        if answered >= 0:
            before = self._render(messages[:answered], where, ask=True)
            done = before + self._answer(before, messages[: answered + 1], where)
        self._extend(ids, trained, done, prompt, where, train=False)
        return ids

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: end of text, and the one that closes an assistant's turn in this template."""
        turn = self.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        last = turn.ids[-1]
        stops = {self.tokenizer.eos_token_id}
        if last in self.tokenizer.all_special_ids or last in self.tokenizer.added_tokens_decoder:
            stops.add(last)
        return sorted(stops)

    @property
    def pad_id(self) -> int:
        """The id that fills short rows. Any will do: what is trained is decided by position, never by id."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def decode(self, ids: list[int]) -> str:
        """Return the text of an answer's ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _encode_text(self, text: str) -> Encoded:
        ids = self.tokenizer(text, add_special_tokens=True)["input_ids"]
        if ids[-1:] != [self.tokenizer.eos_token_id]:
            ids = [*ids, self.tokenizer.eos_token_id]
        return Encoded(ids, [True] * len(ids))

    def _answer(self, prompt: str, messages: Messages, where: str) -> str:
        """Return the text that ``messages``' last turn adds to ``prompt``, up to and including what ends the turn."""
        full = self._render(messages, where, ask=False)
        if not full.startswith(prompt):
            raise DataError(f"{where}: the chat template does not continue its own prompt with the answer; choose data.template")
        # What follows the end token (a line break in ChatML) opens the next turn; the model stops before it.
        answer = full[len(prompt) :].rstrip()
        return answer if answer.endswith(self._end_tokens) else answer + self.tokenizer.eos_token

    @cached_property
    def _end_tokens(self) -> tuple[str, ...]:
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        return tuple({token for token in [*added, *self.tokenizer.all_special_tokens] if token.strip()})

    def _render(self, messages: Messages, where: str, ask: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False, add_generation_prompt=ask)
        except TemplateError as error:
            raise DataError(f"{where}: the chat template refuses this conversation: {error}") from error

    def _extend(self, ids: list[int], trained: list[bool], done: str, text: str, where: str, train: bool) -> None:
        """Append the ids of what ``text`` adds to ``done``. Encoded apart, so that no token spans prompt and answer."""
        if not text.startswith(done):
            raise DataError(
                f"{where}: the chat template rewrites earlier turns, so they cannot be trained turn by turn; keep one answer a row"
            )
        more = self.tokenizer(text[len(done) :], add_special_tokens=False)["input_ids"]
        ids.extend(more)
        trained.extend([train] * len(more))
