"""Which rows meet in which step: a pure function of the seed and the step's number, so resuming needs no loader state."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from qlite.data.encode import IGNORED, Encoded
from qlite.data.pack import pack
from qlite.device import mix_seed

# Micro-batches among which rows are sorted by length. More would pad less, and make a step's rows less random.
SORTED_TOGETHER = 32


@dataclass(frozen=True)
class Batch:
    """Lines padded on the right to the longest of them: ``input_ids`` [B, T]; ``labels`` [B, T], -100 where untrained.

    ``position_ids`` [B, T], where lines hold several documents: counted anew from each one's start; None where each line is one row.
    ``labels`` stay on the CPU: which positions are trained is known there without waiting for a device.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    """Tokens of each line that are not padding."""
    position_ids: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.lengths)

    @property
    def size(self) -> int:
        """B * T: tokens with padding and all."""
        return self.input_ids.numel()

    @property
    def trained_tokens(self) -> int:
        """Labels that a causal model can predict: the first token of a row has nothing before it."""
        return len(self.targets)

    @cached_property
    def targets(self) -> np.ndarray:
        """The trained tokens [N], line after line: int64."""
        return np.from_dlpack(self.labels).reshape(-1)[self.predicts + 1]

    @cached_property
    def predicts(self) -> np.ndarray:
        """Row-major places in [B, T] of the hidden states that predict ``targets``, one before each: [N] int64."""
        # In numpy, by DLPack: where a step is traced on fake tensors, no tensor operation gives a value, ``.numpy()`` included.
        line, place = np.nonzero(np.from_dlpack(self.labels)[:, 1:] != IGNORED)
        return line * self.labels.shape[1] + place

    def halves(self) -> tuple["Batch", "Batch"] | None:
        """Return two batches that hold the documents of this one, each only as wide as it must be; None if it is a single document.

        It is cut between two lines or, where there is but one, between the two documents of it that are nearest its middle.
        """
        lines = len(self.lengths)
        if lines > 1:
            middle = (lines + 1) // 2
            return self._lines(0, middle), self._lines(middle, lines)
        if self.position_ids is None:
            return None
        (length,) = self.lengths
        starts = np.flatnonzero(self.position_ids[0, :length].numpy() == 0)[1:]
        if not len(starts):
            return None
        cut = int(min(starts, key=lambda start: abs(2 * start - length)))
        return self._stretch(0, cut), self._stretch(cut, length)

    def _lines(self, start: int, stop: int) -> "Batch":
        lengths = self.lengths[start:stop]
        lines, width = slice(start, stop), max(lengths)
        positions = None if self.position_ids is None else self.position_ids[lines, :width]
        return Batch(self.input_ids[lines, :width], self.labels[lines, :width], lengths, positions)

    def _stretch(self, start: int, stop: int) -> "Batch":
        """Return the tokens from ``start`` to ``stop``, whole documents, of a single line."""
        tensors = (self.input_ids, self.labels, self.position_ids)
        ids, labels, positions = (tensor[:, start:stop] for tensor in tensors)
        return Batch(ids, labels, (stop - start,), positions)

    @classmethod
    def of(cls, rows: Sequence[Encoded], pad_id: int) -> "Batch":
        """Return ``rows`` as one batch, a row a line."""
        lines = cls.packed([[row] for row in rows], pad_id)
        return cls(lines.input_ids, lines.labels, lines.lengths)

    @classmethod
    def packed(cls, lines: Sequence[Sequence[Encoded]], pad_id: int) -> "Batch":
        """Return a batch of lines that hold several rows each. The padding at a line's end counts as a document of its own."""
        width = max(sum(map(len, line)) for line in lines)
        input_ids = torch.full((len(lines), width), pad_id)
        labels = torch.full((len(lines), width), IGNORED)
        positions = torch.zeros((len(lines), width), dtype=torch.long)
        lengths = []
        for index, line in enumerate(lines):
            start = 0
            for row in line:
                stop = start + len(row)
                ids = torch.as_tensor(row.ids, dtype=torch.long)
                input_ids[index, start:stop] = ids
                labels[index, start:stop] = torch.where(torch.as_tensor(row.trained, dtype=torch.bool), ids, IGNORED)
                labels[index, start] = IGNORED  # what stands before it belongs to another document
                positions[index, start:stop] = torch.arange(len(row))
                start = stop
            positions[index, start:] = torch.arange(width - start)
            lengths.append(start)
        return cls(input_ids, labels, tuple(lengths), positions)


@dataclass(eq=False)
class TokenBatches:
    """The training rows, cut into steps of ``accumulation`` micro-batches of ``micro_batch`` lines.

    A line is one row or, with ``pack_tokens``, as many as fit into so many tokens.
    """

    rows: Sequence[Encoded]
    micro_batch: int
    accumulation: int
    seed: int
    pad_id: int
    pack_tokens: int | None = None
    _kept: tuple[int, list] = field(default=(-1, []), init=False, repr=False)
    """One epoch's number and micro-batches."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        own = getattr(self.rows, "lengths", None)
        return np.array([len(row) for row in self.rows]) if own is None else own

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the rows; the last may be smaller. The same in every epoch, whatever its order."""
        return -(-len(self._lines(np.arange(len(self.lengths)))) // (self.micro_batch * self.accumulation))

    def step(self, number: int) -> list[Batch]:
        """Return the micro-batches of step ``number``, counted from 1; the largest comes first."""
        return [self._batch(lines) for lines in self.plan(number)]

    def plan(self, number: int) -> list[list[list[int]]]:
        """Return the micro-batches of step ``number`` as lines of row numbers."""
        epoch, within = divmod(number - 1, self.steps_per_epoch)
        kept = self._kept  # read once: the thread that prepares the next step may put another epoch there
        if kept[0] != epoch:
            kept = self._kept = (epoch, self._epoch(epoch))
        micro_batches = kept[1]
        return sorted(micro_batches[within * self.accumulation : (within + 1) * self.accumulation], key=self._size, reverse=True)

    def _batch(self, lines: list[list[int]]) -> Batch:
        rows = [[self.rows[index] for index in line] for line in lines]
        return Batch.packed(rows, self.pad_id) if self.pack_tokens else Batch.of([row for (row,) in rows], self.pad_id)

    def _epoch(self, epoch: int) -> list[list[list[int]]]:
        # A generator of its own: dropout's draws never move the data, and the data never moves dropout's.
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        order = torch.randperm(len(self.lengths), generator=generator).numpy()
        lines = self._lines(order)
        if self.pack_tokens:
            lines = [lines[i] for i in torch.randperm(len(lines), generator=generator).tolist()]
        micro_batches = list(self._grouped(lines, generator))
        if epoch == 0:
            # The largest of all first: what does not fit into memory shows at step 1.
            largest = max(range(len(micro_batches)), key=lambda index: self._size(micro_batches[index]))
            micro_batches[0], micro_batches[largest] = micro_batches[largest], micro_batches[0]
        return micro_batches

    def _lines(self, order: np.ndarray) -> list[list[int]]:
        """Return the rows in ``order`` as lines."""
        if self.pack_tokens is None:
            return [[index] for index in order.tolist()]
        return [[int(order[i]) for i in line] for line in pack(self.lengths[order], self.pack_tokens)]

    def _grouped(self, lines: list[list[int]], generator: torch.Generator) -> Iterator[list[list[int]]]:
        """Yield micro-batches of lines of like length, in random order within each stretch that was sorted."""
        size = self.micro_batch
        stretch = size * max(SORTED_TOGETHER, self.accumulation)
        for start in range(0, len(lines), stretch):
            part = sorted(lines[start : start + stretch], key=lambda line: self._width([line]), reverse=True)
            groups = [part[i : i + size] for i in range(0, len(part), size)]
            order = torch.randperm(len(groups), generator=generator).tolist()
            # The one that is not full stays last: in mid-epoch it would move all others.
            order.sort(key=lambda index: len(groups[index]) < size)
            yield from (groups[index] for index in order)

    def _size(self, lines: list[list[int]]) -> int:
        """Return the tokens of a micro-batch, padding and all."""
        return self._width(lines) * len(lines)

    def _width(self, lines: list[list[int]]) -> int:
        return max(int(self.lengths[line].sum()) for line in lines)


def batches_of(rows: Sequence[Encoded], size: int, pad_id: int) -> Iterator[Batch]:
    """Yield ``rows`` in order as batches of ``size`` rows; the last may be smaller."""
    for start in range(0, len(rows), size):
        yield Batch.of([rows[index] for index in range(start, min(start + size, len(rows)))], pad_id)
