"""What a merge does to a model: merged weights beside the live adapter on the same rows, before they are written and after.

The weights stand in for the modules that hold them, one at a time: no merged model is ever whole in memory. They multiply as they would be
written, in the digits that are left of them; all between them computes as the run did. So what differs is what merging rounds, what a
quantised file takes away, and what the base's own quantisation had changed where the merge is over the original weights.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from qlite.data.encode import Encoded
from qlite.methods.base import AdaptedLinear, adapters_off
from qlite.methods.token_rows import RowsEmbedding
from qlite.model.head import hidden_states, logits_head
from qlite.quant.embedding import QuantEmbedding, embedding_shell, is_embedding
from qlite.quant.linear import is_linear

Weights = Callable[[str], Iterable[Tensor]]
"""Gives the merged weight [out, in] of this dotted name, some rows at a time, in any float dtype, on any device."""
TOKENS_AT_ONCE = 4096
LOGITS_AT_ONCE = 1 << 25
"""Of each model, in float32: 128 MiB."""


@dataclass(frozen=True)
class Agreement:
    """How a merged model agrees with the live one."""

    kl: float
    """Mean over all trained positions of KL(live || merged), nats."""
    top1: float
    """Share of those positions where both find the same token likeliest."""
    loss: float
    """Of the merged model on them, nats a token."""
    live_loss: float
    answers: int
    """Greedy answers of the live model that were looked at."""
    same_answers: int
    """How many of them the merged model would have given, token for token: it finds each token of theirs likeliest, too."""
    layers: dict[str, float]
    """Of each adapted linear, for the merged model's own inputs: |merged output - live output| / |live output|, Frobenius norms."""

    @property
    def worst_layer(self) -> tuple[str, float]:
        return max(self.layers.items(), key=lambda each: each[1], default=("", 0.0))

    def as_record(self) -> dict:
        return asdict(self)


class LiveModel:
    """A model with its adapter live on some rows: what it thinks is computed once, and others are compared with that."""

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[Encoded],
        answers: Sequence[Encoded],
        pad_id: int,
        told: Callable[[int, int], None] = lambda *_: None,
    ):
        """rows: what is measured on, where they are trained. answers: the model's own greedy answers, trained where they are its own.

        ``told`` here and below: (rows done, of all).
        """
        self._model, self._head, self._batches = model.eval(), logits_head(model), []
        self._answers = sum(any(row.trained[1:]) for row in answers)
        waiting = [(row, False) for row in rows] + [(row, True) for row in answers]
        waiting = sorted((each for each in waiting if any(each[0].trained[1:])), key=lambda each: len(each[0]), reverse=True)
        self._rows = len(waiting)
        while waiting:
            count = max(1, TOKENS_AT_ONCE // len(waiting[0][0]))
            batch = _batch(waiting[:count], pad_id)
            batch.states = self._states(batch)
            self._batches.append(batch)
            waiting = waiting[count:]
            told(self._rows - len(waiting), self._rows)

    @torch.no_grad()
    def compared(self, weights: Weights, told: Callable[[int, int], None] = lambda *_: None, with_layers: bool = True) -> Agreement:
        """Return how the model on merged ``weights`` agrees; ``with_layers``: what they change is measured in each adapted linear, too."""
        measured: dict[str, tuple[float, float]] | None = {} if with_layers else None
        sums = self._sums(lambda: _standing_in(self._model, weights, measured), lambda: _standing_in(self._model, weights, None), told)
        layers = {name: (difference / max(whole, 1e-30)) ** 0.5 for name, (difference, whole) in (measured or {}).items()}
        return sums.agreement(self._answers, layers)

    @torch.no_grad()
    def compared_to_base(self, told: Callable[[int, int], None] = lambda *_: None) -> Agreement:
        """Return how the model without its adapter agrees: what training has changed."""
        return self._sums(*[lambda: adapters_off(self._model)] * 2, told).agreement(self._answers, {})

    def _sums(self, as_other: Callable, as_others_head: Callable, told: Callable[[int, int], None]) -> "_Sums":
        sums, done = _Sums(), 0
        count = max(1, LOGITS_AT_ONCE // self._model.config.get_text_config().vocab_size)
        told(0, self._rows)
        for batch in self._batches:
            with as_other():
                other = self._states(batch)
            for start in range(0, len(batch.places), count):
                part = slice(start, start + count)
                live = self._logits(batch.states[part])
                with as_others_head():
                    theirs = self._logits(other[part])
                owners = [done + owner for owner in batch.owners[part]]
                sums.add(live, theirs, batch.wanted[part], batch.is_answer[part], owners)
            done += len(batch.ids)
            told(done, self._rows)
        return sums

    def _states(self, batch: "_Batch") -> Tensor:
        """Return the hidden states [N, D] at the batch's places, on the CPU."""
        states = hidden_states(self._model, batch.ids.to(self._model.device))
        return states.reshape(-1, states.shape[-1]).index_select(0, batch.places.to(states.device)).cpu()

    def _logits(self, states: Tensor) -> Tensor:
        return self._head(states.to(self._model.device)).float()


class _Sums:
    """What is summed over positions."""

    def __init__(self) -> None:
        self.count, self.kl, self.same, self.loss, self.live_loss = 0, 0.0, 0, 0.0, 0.0
        self.others: set[int] = set()
        """Answers of which the merged model would have given another token."""

    def add(self, live: Tensor, merged: Tensor, wanted: Tensor, is_answer: Tensor, owners: list[int]) -> None:
        live, merged = live.log_softmax(-1), merged.log_softmax(-1)
        same = (live.argmax(-1) == merged.argmax(-1)).cpu()
        told = zip(owners, same.tolist(), is_answer.tolist(), strict=True)
        self.others |= {owner for owner, is_same, is_answers in told if is_answers and not is_same}
        rows = (~is_answer).nonzero().view(-1)
        at = rows.to(live.device)
        live, merged, wanted = live[at], merged[at], wanted.to(live.device)[at].unsqueeze(1)
        self.count += len(rows)
        self.kl += float((live.exp() * (live - merged)).sum())
        self.same += int(same[rows].sum())
        self.live_loss -= float(live.gather(1, wanted).sum())
        self.loss -= float(merged.gather(1, wanted).sum())

    def agreement(self, answers: int, layers: dict[str, float]) -> Agreement:
        count = max(1, self.count)
        means = {"kl": self.kl / count, "top1": self.same / count, "loss": self.loss / count, "live_loss": self.live_loss / count}
        return Agreement(**means, answers=answers, same_answers=answers - len(self.others), layers=layers)


@dataclass
class _Batch:
    """Some rows that are read together."""

    ids: Tensor
    """[B, T], padded on the right"""
    places: Tensor
    """Of each trained position, the place in [B * T] before it: that of the logits that are to find it."""
    wanted: Tensor
    """The token at each of them."""
    is_answer: Tensor
    """Whether each stands in one of the live model's answers."""
    owners: list[int]
    """The row of each."""
    states: Tensor | None = None
    """The live model's last hidden states there [N, D]."""


def _batch(rows: list[tuple[Encoded, bool]], pad_id: int) -> _Batch:
    width = len(rows[0][0])
    ids = torch.full((len(rows), width), pad_id)
    places, wanted, is_answer, owners = [], [], [], []
    for number, (row, answers) in enumerate(rows):
        ids[number, : len(row)] = torch.as_tensor(list(map(int, row.ids)))
        trained = [index for index in range(1, len(row)) if row.trained[index]]
        places += [number * width + index - 1 for index in trained]
        wanted += [int(row.ids[index]) for index in trained]
        is_answer += [answers] * len(trained)
        owners += [number] * len(trained)
    return _Batch(ids, torch.tensor(places), torch.tensor(wanted), torch.tensor(is_answer), owners)


@contextmanager
def _standing_in(model: nn.Module, weights: Weights, measured: dict[str, tuple[float, float]] | None) -> Iterator[None]:
    """Let ``weights`` multiply, and be looked up, wherever ``model`` has a matrix; ``measured`` takes what that changes, by linear."""
    inner, changed = set(), []
    try:
        for name, module in model.named_modules():
            if module in inner:
                continue
            if isinstance(module, AdaptedLinear):
                forward = partial(_adapted, module, name, weights, measured)
            elif isinstance(module, RowsEmbedding) or is_embedding(module):
                forward = partial(_looked_up, module, _shell(module), f"{name}.weight", weights)
            elif is_linear(module):
                forward = partial(_product, module.bias, f"{name}.weight", weights)
            else:
                continue
            inner |= set(module.modules())
            changed.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, forward in changed:
            del module.forward
            if forward is not None:  # an embedding on the host has one of its own
                module.forward = forward


def _adapted(module: AdaptedLinear, name: str, weights: Weights, measured: dict[str, tuple[float, float]] | None, x: Tensor) -> Tensor:
    y = _product(module.merged_bias(module.frozen.bias), f"{name}.weight", weights, x)
    if measured is not None:
        live = type(module).forward(module, x)
        difference, whole = measured.get(name, (0.0, 0.0))
        measured[name] = (difference + float((y.float() - live.float()).square().sum()), whole + float(live.float().square().sum()))
    return y


def _product(bias: Tensor | None, name: str, weights: Weights, x: Tensor) -> Tensor:
    wide = x.float()
    y = torch.cat([wide @ rows.to(x.device, torch.float32).T for rows in weights(name)], -1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _shell(embedding: nn.Module) -> nn.Embedding | None:
    """Return what runs the family's own code on given rows (Gemma's scales them); None where that only looks them up."""
    shell = embedding.shell if isinstance(embedding, RowsEmbedding) else embedding_shell(embedding)
    if shell is not None:
        shell.__dict__.pop("forward", None)  # of an embedding on the host
    return shell


def _looked_up(embedding: nn.Module, shell: nn.Embedding | None, name: str, weights: Weights, ids: Tensor) -> Tensor:
    frozen, places = embedding.base if isinstance(embedding, RowsEmbedding) else embedding, ids.reshape(-1)
    dtype = frozen.table.compute_dtype if isinstance(frozen, QuantEmbedding) else frozen.weight.dtype
    found, start = torch.empty((len(places), frozen.embedding_dim), dtype=dtype, device=ids.device), 0
    for rows in weights(name):
        here = ((places >= start) & (places < start + len(rows))).nonzero().view(-1)
        found[here] = rows.to(ids.device)[places[here] - start].to(dtype)
        start += len(rows)
    if shell is None:
        return found.view(*ids.shape, -1)
    return functional_call(shell, {"weight": found}, (torch.arange(len(places), device=ids.device).view(ids.shape),))
