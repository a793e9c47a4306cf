"""Which rows meet in which step: a pure function of the seed and the step's number, so resuming needs no loader state."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qlite.data.encode import IGNORED, Encoded
from qlite.device import mix_seed


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to the longest of them: ``input_ids`` [B, T]; ``labels`` [B, T], -100 where untrained.

    ``labels`` stay on the CPU: which positions are trained is known there without waiting for a device.
    """

    input_ids: Tensor
    labels: Tensor
    tokens: int
    """Tokens that are not padding."""

    @property
    def trained_tokens(self) -> int:
        """Labels that a causal model can predict: the first token of a row has nothing before it."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @classmethod
    def of(cls, rows: list[Encoded], pad_id: int) -> "Batch":
        """Return ``rows`` as one batch."""
        width = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), width), pad_id)
        labels = torch.full((len(rows), width), IGNORED)
        for index, row in enumerate(rows):
            ids = torch.tensor(row.ids)
            input_ids[index, : len(row)] = ids
            labels[index, : len(row)] = torch.where(torch.tensor(row.trained), ids, IGNORED)
        return cls(input_ids, labels, sum(len(row) for row in rows))


@dataclass(frozen=True)
class TokenBatches:
    """The training rows, cut into steps of ``accumulation`` micro-batches of ``micro_batch`` rows."""

    rows: list[Encoded]
    micro_batch: int
    accumulation: int
    seed: int
    pad_id: int

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the rows; the last may be smaller."""
        return -(-len(self.rows) // (self.micro_batch * self.accumulation))

    def step(self, number: int) -> list[Batch]:
        """Return the micro-batches of step ``number``, counted from 1.

        Each epoch has its own order. Within a step rows are grouped by length: that moves padding, not the gradient.
        """
        epoch, within = divmod(number - 1, self.steps_per_epoch)
        size = self.micro_batch * self.accumulation
        chosen = [self.rows[i] for i in self._order(epoch)[within * size : (within + 1) * size]]
        chosen.sort(key=len, reverse=True)
        return list(batches_of(chosen, self.micro_batch, self.pad_id))

    def _order(self, epoch: int) -> list[int]:
        # A generator of its own: dropout's draws never move the data, and the data never moves dropout's.
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        return torch.randperm(len(self.rows), generator=generator).tolist()


def batches_of(rows: list[Encoded], size: int, pad_id: int) -> Iterator[Batch]:
    """Yield ``rows`` in order as batches of ``size`` rows; the last may be smaller."""
    for start in range(0, len(rows), size):
        yield Batch.of(rows[start : start + size], pad_id)
