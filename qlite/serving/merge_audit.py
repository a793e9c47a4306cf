"""What a merge does to a model: merged weights beside the live adapter on the same rows, before they are written and after.

The weights stand in for the modules that hold them, one at a time: no merged model is ever whole in memory. They multiply as they would be
written, in their own dtype's digits; all between them computes as the run did. So what differs is what merging rounds, and what the base's
quantisation had changed where the merge is over the original weights.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlite.data.encode import Encoded
from qlite.methods.base import AdaptedLinear
from qlite.methods.whole import Whole
from qlite.model.head import hidden_states, logits_head
from qlite.quant.embedding import QuantEmbedding
from qlite.quant.linear import QuantLinear

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


@torch.no_grad()
def agreement(
    model: PreTrainedModel,
    weights: Weights,
    rows: Sequence[Encoded],
    answers: Sequence[Encoded],
    pad_id: int,
    told: Callable[[int, int], None] = lambda *_: None,
) -> Agreement:
    """Compare ``model``, its adapter live, with itself on merged ``weights``.

    rows: what is measured on, where they are trained. answers: the live model's own greedy answers, trained where they are its own.
    ``told``: (rows done, of all).
    """
    model.eval()
    head, sums, measured = logits_head(model), _Sums(), {}
    waiting = [(row, False) for row in rows] + [(row, True) for row in answers]
    waiting = sorted((each for each in waiting if any(each[0].trained[1:])), key=lambda each: len(each[0]), reverse=True)
    done, total = 0, len(waiting)
    told(0, total)
    while waiting:
        batch = waiting[: max(1, TOKENS_AT_ONCE // len(waiting[0][0]))]
        waiting = waiting[len(batch) :]
        ids, places, wanted, owners = _batch([row for row, _ in batch], pad_id)
        live = _at(hidden_states(model, ids.to(model.device)), places)
        with _standing_in(model, weights, measured):
            merged = _at(hidden_states(model, ids.to(model.device)), places)
        count = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
        for start in range(0, len(places), count):
            part = slice(start, start + count)
            live_logits = head(live[part]).float()
            with _standing_in(model, weights, {}):
                merged_logits = head(merged[part]).float()
            is_answer = torch.tensor([batch[owner][1] for owner in owners[part]])
            sums.add(live_logits, merged_logits, wanted[part], is_answer, [done + owner for owner in owners[part]])
        done += len(batch)
        told(done, total)
    layers = {name: (difference / max(whole, 1e-30)) ** 0.5 for name, (difference, whole) in measured.items()}
    return sums.agreement(sum(any(row.trained[1:]) for row in answers), layers)


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


def _batch(rows: list[Encoded], pad_id: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Return ids [B, T] padded on the right, and of each trained position: its place in [B * T] before it, its token, its row."""
    width = len(rows[0])
    ids = torch.full((len(rows), width), pad_id)
    places, wanted, owners = [], [], []
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.as_tensor(list(map(int, row.ids)))
        trained = [index for index in range(1, len(row)) if row.trained[index]]
        places += [number * width + index - 1 for index in trained]
        wanted += [int(row.ids[index]) for index in trained]
        owners += [number] * len(trained)
    return ids, torch.tensor(places), torch.tensor(wanted), owners


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, places.to(hidden.device))


@contextmanager
def _standing_in(model: nn.Module, weights: Weights, measured: dict[str, tuple[float, float]]) -> Iterator[None]:
    """Let ``weights`` multiply wherever ``model`` has an adapter or packed weights; ``measured`` takes what that changes, by linear."""
    inner, changed = set(), []
    try:
        for place, module in model.named_modules():
            if module in inner:
                continue
            name = place.removesuffix(".base")  # of an embedding that has some trained rows
            if isinstance(module, AdaptedLinear):
                inner |= set(module.modules())
                module.forward = partial(_adapted, module, name, weights, measured)
            elif isinstance(module, Whole):
                inner |= set(module.modules())
                continue
            elif isinstance(module, QuantEmbedding):
                inner |= set(module.modules())
                module.table.rows = partial(_rows, module, name, weights)
                module = module.table
            elif isinstance(module, QuantLinear):
                module.forward = partial(_product, module, f"{name}.weight", weights)
            else:
                continue
            changed.append(module)
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)
            module.__dict__.pop("rows", None)


def _adapted(module: AdaptedLinear, name: str, weights: Weights, measured: dict[str, tuple[float, float]], x: Tensor) -> Tensor:
    y = _product(module.base, f"{name}.weight", weights, x)
    live = type(module).forward(module, x)
    difference, whole = measured.get(name, (0.0, 0.0))
    measured[name] = (difference + float((y.float() - live.float()).square().sum()), whole + float(live.float().square().sum()))
    return y


def _product(linear: nn.Module, name: str, weights: Weights, x: Tensor) -> Tensor:
    wide = x.float()
    y = torch.cat([wide @ rows.to(x.device, torch.float32).T for rows in weights(name)], -1)
    return (y if linear.bias is None else y + linear.bias.float()).to(x.dtype)


def _rows(embedding: QuantEmbedding, name: str, weights: Weights, places: Tensor) -> Tensor:
    found, start = torch.empty((len(places), embedding.embedding_dim), dtype=embedding.table.compute_dtype, device=places.device), 0
    for rows in weights(f"{name}.weight"):
        here = ((places >= start) & (places < start + len(rows))).nonzero().view(-1)
        found[here] = rows.to(places.device)[places[here] - start].to(found.dtype)
        start += len(rows)
    return found
