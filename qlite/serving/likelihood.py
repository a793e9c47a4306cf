"""How likely a model finds given continuations of given prompts, and multiple choice decided by it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlite import device
from qlite.errors import OutOfMemory
from qlite.model.head import hidden_states, logits_head

# Tokens that go through the model together: an 8B model's widest activation, [tokens, 14336] in 16 bit, takes 112 MiB then.
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Continuation:
    """Token ids, and those that come before them; there is at least one of each."""

    prompt: list[int]
    ids: list[int]

    def __post_init__(self):
        assert self.prompt, "the first token of a text has nothing before it that could predict it"
        assert self.ids, "an empty continuation has no likelihood"

    @property
    def read(self) -> tuple[int, ...]:
        """What the model has to read: nothing is predicted from the last token."""
        return (*self.prompt, *self.ids[:-1])


@dataclass(frozen=True)
class Accuracy:
    """Shares of questions, 0 to 1, whose right choice is the likeliest: by the sum of its tokens' log-probabilities, and by
    that sum divided by the choice's characters (acc and acc_norm of EleutherAI's lm-evaluation-harness)."""

    by_sum: float
    by_character: float


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, continuations: list[Continuation], pad_id: int, chunk: int = 512, told: Callable[[int], None] = lambda _: None
) -> list[float]:
    """Return the sum of the log-probabilities, in nats, that ``model`` gives each continuation's ids after its prompt, in order.

    Logits are made for the predicting positions alone, ``chunk`` of them at a time, and their softmax is taken in float32. What is read
    alike (one-token choices of one question) is read once. ``told`` hears how many continuations are done. How the rows are
    split into batches changes nothing but the rounding of the model's own dtype; where memory runs out, half as many are read together.

    Raises:
        OutOfMemory: a single text does not fit.
    """
    model.eval()
    head = logits_head(model)
    sums = [0.0] * len(continuations)
    done = 0
    owners: dict[tuple[int, ...], list[int]] = {}
    for index, continuation in enumerate(continuations):
        owners.setdefault(continuation.read, []).append(index)
    # The longest first, so that a lack of memory shows at once.
    waiting, at_once = sorted(owners, key=len, reverse=True), TOKENS_AT_ONCE
    while waiting:
        texts = waiting[: max(1, at_once // len(waiting[0]))]
        asked = [(row, index) for row, text in enumerate(texts) for index in owners[text]]
        found = None
        with device.Attempt():
            hidden = hidden_states(model, _padded(texts, pad_id).to(model.device))
            found = _each_token(head, hidden, asked, continuations, chunk)
        if found is None:
            device.free_cached(model.device)
            at_once = _half(len(texts), len(texts[0]))
            continue
        for index, value in zip(*found, strict=True):
            sums[index] += value
        waiting = waiting[len(texts) :]
        done += len(asked)
        told(done)
    return sums


def accuracy(likelihoods: list[list[float]], choices: list[tuple[str, ...]], right: list[int]) -> Accuracy:
    """Return how often the right one of ``choices`` is the likeliest; of equals the first counts, as in lm-evaluation-harness.

    likelihoods: for each question the sums of ``log_likelihoods``, one a choice; right: the index of the right choice.
    """
    assert right, "an accuracy over no question is none"
    by_sum = [_largest(sums) for sums in likelihoods]
    means = [[s / max(1, len(text)) for s, text in zip(sums, texts, strict=True)] for sums, texts in zip(likelihoods, choices, strict=True)]
    by_character = [_largest(values) for values in means]
    return Accuracy(_share_equal(by_sum, right), _share_equal(by_character, right))


def _half(rows: int, width: int) -> int:
    """Return half the tokens that ``rows`` texts of ``width`` tokens took. Raises OutOfMemory if it was only one text."""
    if rows == 1:
        raise OutOfMemory(f"out of memory in reading a single text of {width} tokens; shorten it, or free memory", 1, width)
    return rows * width // 2


def _padded(texts: list[tuple[int, ...]], pad_id: int) -> Tensor:
    """Return ``texts`` [B, T], filled up on the right, where a causal model's real tokens cannot look."""
    ids = torch.full((len(texts), max(map(len, texts))), pad_id)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    return ids


def _each_token(
    head: nn.Module, hidden: Tensor, asked: list[tuple[int, int]], continuations: list[Continuation], chunk: int
) -> tuple[list[int], list[float]]:
    """Return, for every token of the continuations ``asked`` for as (row of hidden [B, T, D], index), that index and log p(token)."""
    owners, places, targets = [], [], []
    for row, index in asked:
        continuation = continuations[index]
        first = row * hidden.shape[1] + len(continuation.prompt) - 1
        owners += [index] * len(continuation.ids)
        places += range(first, first + len(continuation.ids))
        targets += continuation.ids
    used = hidden.reshape(-1, hidden.shape[-1]).index_select(0, torch.tensor(places, device=hidden.device))
    wanted = torch.tensor(targets, device=hidden.device)
    parts = [
        -nn.functional.cross_entropy(head(h).float(), t, reduction="none")
        for h, t in zip(used.split(chunk), wanted.split(chunk), strict=True)
    ]
    return owners, torch.cat(parts).tolist()


def _largest(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _share_equal(chosen: list[int], right: list[int]) -> float:
    return sum(c == r for c, r in zip(chosen, right, strict=True)) / len(right)
