"""A conversation with a model, turn after turn: what was said, what of it fits the context, and what the model has read already."""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from qlite.data.encode import Encoder
from qlite.data.formats import Messages
from qlite.device import is_out_of_memory
from qlite.errors import AdapterError, DataError, MachineError
from qlite.methods.base import adapters_off, longest_input
from qlite.serving.alone import Alone
from qlite.serving.answer import Sampling, TextStream, generate_ids
from qlite.serving.bank import AdapterBank


@dataclass(frozen=True)
class Exchange:
    """What the user said and what the model answered, without its end token."""

    user: str
    answer: str


@dataclass(frozen=True)
class Reply:
    """One answer, and how it came about."""

    text: str
    tokens: int
    """Tokens made, the end token among them."""
    seconds: float
    context: int
    """Tokens of the prompt and the answer together."""
    left_out: int
    """How many of the oldest exchanges were forgotten because they no longer fit the context."""
    is_cut: bool
    """The answer was as long as it may be before the model ended it."""
    is_interrupted: bool
    """Ctrl-C ended it."""


@dataclass(frozen=True)
class Voices:
    """The adapters of a bank, the first of which answers first, and the system message that each was trained under."""

    bank: AdapterBank | Alone
    systems: dict[str, str | None]


class Dialogue:
    """The exchanges with one model so far, under one system message; the adapter can be switched off, on, and to another between them."""

    def __init__(self, model: PreTrainedModel, encoder: Encoder, sampling: Sampling, system: str | None, voices: Voices | None = None):
        self.model, self.encoder, self.sampling, self.system, self.voices = model, encoder, sampling, system, voices
        self.adapter: str | None = None
        """The adapter of ``voices`` that answers."""
        if voices is not None:
            self.adapter = voices.bank.names[0]
            voices.bank.use(self.adapter)
        self.exchanges: list[Exchange] = []
        self.limit = longest_input(model)
        self.is_base = False
        """Whether the adapter is off."""
        self._off = ExitStack()
        self._read = _ReadAlready(model.config)

    def ask(self, user: str, write: Callable[[str], None]) -> Reply:
        """Let the model answer ``user``; ``write`` gets the text as it comes. Ctrl-C ends the answer, and what was said is kept.

        An exchange is remembered if the answer has at least one token. What is sent is ``encode_prompt`` of the whole history.

        Raises:
            DataError: the message alone is longer than the model's context, or the chat template refuses the conversation.
            MachineError: the device's memory does not suffice.
        """
        ids, left_out = self.fit(user)
        started = time.perf_counter()
        budget = min(self.sampling.max_tokens, (self.limit or sys.maxsize) - len(ids))
        stream = TextStream(self.encoder, write)
        is_interrupted = self._generate(ids, replace(self.sampling, max_tokens=budget), stream)
        is_ended = bool(stream.ids) and stream.ids[-1] in self.encoder.stop_ids
        text = self.encoder.decode(stream.ids[:-1] if is_ended else stream.ids)
        if stream.ids and self.encoder.template is not None:  # raw text has no history
            self.exchanges = [*self.exchanges[left_out:], Exchange(user, text)]
        return Reply(
            text=text,
            tokens=len(stream.ids),
            seconds=time.perf_counter() - started,
            context=len(ids) + len(stream.ids),
            left_out=left_out if stream.ids else 0,
            is_cut=len(stream.ids) == budget and not is_ended,
            is_interrupted=is_interrupted,
        )

    def undo(self) -> Exchange | None:
        """Forget the last exchange and return it; None if there is none."""
        return self.exchanges.pop() if self.exchanges else None

    def reset(self) -> None:
        """Forget all exchanges; the system message stays."""
        self.exchanges = []
        self._read.forget()

    def toggle_base(self) -> bool:
        """Switch the adapter off, or on again, and return whether it is off now.

        Raises:
            AdapterError, ModelError: the base is not there any more.
        """
        if self.voices is not None:
            self.voices.bank.require_base()
        self._read.forget()
        if self.is_base:
            self._off.close()
        else:
            self._off.enter_context(adapters_off(self.model))
        self.is_base = not self.is_base
        return self.is_base

    def swap(self, name: str) -> bool:
        """Let the adapter ``name`` answer from now on; return whether the system message has changed with it.

        It does where it is the one that the adapter before was trained under.

        Raises:
            AdapterError: there is none of this name.
        """
        was_base = self.is_base
        if was_base:  # the bank's own switch is the inner one
            self.toggle_base()
        try:
            self.voices.bank.use(name)
        except AdapterError:
            if was_base:
                self.toggle_base()
            raise
        self._read.forget()
        systems, before = self.voices.systems, self.system
        if before == systems[self.adapter]:
            self.system = systems[name]
        self.adapter = name
        return self.system != before

    def messages(self, user: str, left_out: int = 0) -> Messages:
        """Return the conversation that asks for the answer to ``user``, without the ``left_out`` oldest exchanges."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in self.exchanges[left_out:]:
            messages.append({"role": "user", "content": exchange.user})
            messages.append({"role": "assistant", "content": exchange.answer})
        return [*messages, {"role": "user", "content": user}]

    def fit(self, user: str) -> tuple[list[int], int]:
        """Return the ids to send for ``user``, and how many of the oldest exchanges stay out so that an answer still has room.

        Room means ``max_tokens``, but never more than half the context: a small model must remember something.

        Raises:
            DataError: as in ``ask``.
        """
        if self.encoder.template is None and self.system:
            raise DataError("this run was trained on raw text, in which nobody is told anything: leave the system message out")
        limit = self.limit or sys.maxsize
        room = min(self.sampling.max_tokens, limit // 2)
        for left_out in range(len(self.exchanges) + 1):
            ids = self.encoder.encode_prompt(self.messages(user, left_out))
            if not ids:
                raise DataError("the prompt is empty: there is nothing to answer, and no token to begin with")
            if len(ids) + room <= limit:
                return ids, left_out
        if len(ids) >= limit:
            raise DataError(f"the message and what the template adds are {len(ids)} tokens; this model reads at most {limit}: shorten it")
        return ids, left_out

    def _generate(self, ids: list[int], sampling: Sampling, stream: TextStream) -> bool:
        """Let the model go on after ``ids`` into ``stream``; return whether Ctrl-C ended it."""
        prompt = torch.tensor([ids])
        cache = self._read.take(ids)
        try:
            generate_ids(self.model, self.encoder, prompt, torch.ones_like(prompt), sampling, stream, cache)
            self._read.keep(cache, [*ids, *stream.ids])
        except KeyboardInterrupt:
            stream.end()
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            first = (str(error) or "no more to be had").splitlines()[0]
            raise MachineError(f"out of memory with {len(ids)} tokens of context: {first}\nMake the conversation shorter") from error
        return False


class _ReadAlready:
    """The keys and values of the ids that the model read last; where the next prompt begins alike, they are not computed again."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.forget()

    def forget(self) -> None:
        """Let go of it: another model is to answer, or a pass was broken off between two layers."""
        self._cache: Cache | None = None
        self._ids: list[int] = []

    def take(self, ids: list[int]) -> Cache:
        """Return a cache of the longest beginning that ``ids`` shares with what was kept. It is forgotten here until ``keep``."""
        cache, known = self._cache, self._ids
        self.forget()
        # The last id is always computed: its logits choose the first new token.
        shared = _common_length(known, ids[:-1])
        if cache is None or shared == 0:
            return DynamicCache(config=self.config.get_text_config(decoder=True))
        cache.crop(shared - len(known))
        return cache

    def keep(self, cache: Cache, ids: list[int]) -> None:
        """Keep ``cache``, which holds a beginning of ``ids``; one that has let go of old tokens (sliding window) cannot be cut back.

        Nor one that holds more than was said (methods/prompt), where generation could not tell how much of ``ids`` was read.
        """
        if cache.is_croppable and not any(cache.is_sliding) and cache.get_seq_length() < len(ids):
            self._cache, self._ids = cache, ids[: cache.get_seq_length()]


def _common_length(first: list[int], second: list[int]) -> int:
    """Return how many ids the two begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
