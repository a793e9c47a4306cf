"""Answers from a model: greedy or sampled, one at a time as text streams in, or many prompts in one batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from qlite import device
from qlite.data.encode import Encoder
from qlite.errors import OutOfMemory, RecipeError

Answer = TypeVar("Answer", str, list[int])
# A token of the cache takes 128 KiB in an 8B model: 1 GiB at most.
TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0: the most likely one (greedy)."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if self.max_tokens < 1:
            raise RecipeError(f"max tokens {self.max_tokens}: should be 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise RecipeError(f"temperature {self.temperature}: should be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"top-p {self.top_p}: should be more than 0, at most 1")


def answer_batch(model: PreTrainedModel, encoder: Encoder, prompts: list[list[int]], sampling: Sampling) -> list[str]:
    """Return the model's answer to each of ``prompts``, which are token ids, decoded together with a cache."""
    return [encoder.decode(_until_stop(row, encoder.stop_ids)) for row in _new_ids(model, encoder, prompts, sampling)]


def answer_ids(
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: list[list[int]],
    sampling: Sampling,
    told: Callable[[int], None] = lambda _: None,
    chosen: Callable[[list[int]], None] = lambda _: None,
) -> list[list[int]]:
    """Return the ids of the model's answers to ``prompts``, each with the token that ends it, as ``answer_all`` makes them.

    ``chosen`` hears, before each batch, the places in ``prompts`` of its rows.
    """

    def answer(places: list[int]) -> list[list[int]]:
        chosen(places)
        rows = _new_ids(model, encoder, [prompts[place] for place in places], sampling)
        return [row[: len(_until_stop(row, encoder.stop_ids)) + 1] for row in rows]

    return _in_batches(answer, model, prompts, sampling.max_tokens, told)


@torch.no_grad()
def _new_ids(model: PreTrainedModel, encoder: Encoder, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """Return what the model adds to each of ``prompts``; what stands behind the token that ends it is padding.

    Rows are padded on the left: the new tokens of all rows must stand side by side.
    """
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), encoder.pad_id)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    return generate_ids(model, encoder, input_ids, mask, sampling).tolist()


def answer_all(
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: list[list[int]],
    sampling: Sampling,
    told: Callable[[int], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Return the answers to ``prompts``, token ids, in order; ``told`` hears how many are done. Rows of like length meet, to pad little.

    As many rows are decoded together as their cache stays below TOKENS_AT_ONCE tokens; where memory runs out, half as many, and
    ``note`` hears of it.

    Raises:
        OutOfMemory: a single prompt does not fit.
    """

    def answer(places: list[int]) -> list[str]:
        return answer_batch(model, encoder, [prompts[place] for place in places], sampling)

    return _in_batches(answer, model, prompts, sampling.max_tokens, told, note)


def _in_batches(
    answer: Callable[[list[int]], list[Answer]],
    model: PreTrainedModel,
    prompts: list[list[int]],
    max_tokens: int,
    told: Callable[[int], None],
    note: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    lengths, at_once = [len(ids) for ids in prompts], TOKENS_AT_ONCE
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    answers: dict[int, Answer] = {}
    while len(answers) < len(prompts):
        chosen = _first_that_fit(order[len(answers) :], lengths, max_tokens, at_once)
        with device.Attempt() as attempt:
            answers |= dict(zip(chosen, answer(chosen), strict=True))
        if attempt.ran_out:
            device.free_cached(model.device)
            at_once = _half(len(chosen), lengths[chosen[-1]], max_tokens)
            note(f"out of memory in answering {len(chosen)} prompts together: from now on at most {at_once} tokens of cache at once")
        told(len(answers))
    return [answers[i] for i in range(len(prompts))]


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    encoder: Encoder,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
    cache: Cache | None = None,
) -> torch.Tensor:
    """Return only the new ids [B, N]; a row that stopped early is filled up with the pad id.

    ``cache`` may hold what a beginning of ``input_ids`` made the model compute before; the rest is added to it.
    """
    model.eval()
    config = GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_p=sampling.top_p if sampling.temperature > 0 else None,
        top_k=0 if sampling.temperature > 0 else None,  # transformers' own default would keep 50 tokens
        eos_token_id=encoder.stop_ids,
        pad_token_id=encoder.pad_id,
        use_cache=True,
    )
    # transformers hands the head a strided view of the prompt's last states; torch would multiply it row by row, each with
    # its own copy of the head (100 rows on SmolLM2: 5.3 GB and 12 s).
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    inputs = {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device), "past_key_values": cache}
    try:
        ids = model.generate(**inputs, generation_config=config, streamer=streamer)
    finally:
        hook.remove()
    return ids[:, input_ids.shape[1] :]


class TextStream(BaseStreamer):
    """Hands over an answer's text piece by piece as its tokens arrive, never half a character."""

    def __init__(self, encoder: Encoder, write: Callable[[str], None]):
        self.encoder, self.write = encoder, write
        self.ids: list[int] = []
        self._written = ""
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the next ids; the first call brings the prompt."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self.encoder.decode(_until_stop(self.ids, self.encoder.stop_ids))
        # A character of several tokens decodes to U+FFFD until its last one is there.
        if not text.endswith("\ufffd"):
            self.write(text[len(self._written) :])
            self._written = text

    def end(self) -> None:
        """Hand over what was held back: an answer may end in half a character."""
        self.write(self.encoder.decode(_until_stop(self.ids, self.encoder.stop_ids))[len(self._written) :])


def _first_that_fit(order: list[int], lengths: list[int], max_tokens: int, at_once: int) -> list[int]:
    """Return as many of ``order``, shortest first, as their padded cache of ``at_once`` tokens may hold; at least one."""
    rows = 1
    while rows < len(order) and (rows + 1) * (lengths[order[rows]] + max_tokens) <= at_once:
        rows += 1
    return order[:rows]


def _half(rows: int, width: int, max_tokens: int) -> int:
    """Return half the tokens of cache that ``rows`` prompts of ``width`` tokens took. Raises OutOfMemory if it was only one."""
    if rows == 1:
        message = (
            f"out of memory in answering a single prompt of {width} tokens with up to {max_tokens} more. "
            "Lower train.answer_tokens in a recipe, --max-tokens on the command line, or shorten the prompt"
        )
        raise OutOfMemory(message, rows, width + max_tokens)
    return rows * (width + max_tokens) // 2


def _until_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))]
