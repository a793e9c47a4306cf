"""What a look at the data shows: rows kept and left out, lengths, and how much of each batch is padding."""

from dataclasses import asdict, dataclass

import numpy as np

from qlite.data.batches import TokenBatches
from qlite.data.check import untrained
from qlite.data.dataset import DataSet
from qlite.data.store import Rows

BINS = 24
"""Bars of the lengths that a run keeps."""
SAMPLED_STEPS = 2000
"""Steps of the first epoch that padding is counted over at most."""


@dataclass(frozen=True)
class Spread:
    """Smallest, middle, nearly largest and largest of some numbers."""

    low: int
    median: int
    most: int
    """99 % are at most this."""
    high: int

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """Return the spread of ``values``, of which there is at least one."""
        return cls(int(values.min()), int(np.median(values)), int(np.quantile(values, 0.99, method="higher")), int(values.max()))


def histogram(lengths: np.ndarray, bins: int) -> list[tuple[int, int, int]]:
    """Return (from, up to and including, rows) of ``bins`` equal steps of round width that hold all ``lengths``."""
    width = max(1, -(-int(lengths.max()) // bins))
    scale = 10 ** max(0, len(str(width)) - 2)
    width = -(-width // scale) * scale
    counts = np.bincount((lengths - 1) // width)
    return [(index * width + 1, (index + 1) * width, int(count)) for index, count in enumerate(counts)]


def overview(data: DataSet) -> list[dict]:
    """Return, for a file, where the rows of each part come from, how many are kept and left out and why, and their lengths in tokens.

    ``held_out_twins``: rows left out for being equal to held-out ones. Lengths are those of the rows as they were read.
    """
    found = []
    for number, part in enumerate(data.parts):
        is_train, lengths = number == 0, part.rows.store.length
        held = len(data.test) if not is_train or len(data.parts) == 1 else 0
        left = {"untrained": untrained(part)[0], "bad": part.meta["left"]["bad"]["count"], "held_out_twins": part.dropped}
        named = zip(part.meta["sources"], part.paths, strict=True)
        sources = [{"path": path, "rows": source["rows"], "format": source["format"]} for source, path in named]
        found.append(
            {"key": part.key, "sources": sources, "read": part.read, "kept": len(part.rows)}
            | {"used": len(data.train) if is_train else 0, "held_out": held, "left_out": left, "long": len(part.cut.long)}
            | {"tokens": int(part.rows.lengths.sum()), "trained_tokens": int(part.rows.trained_counts.sum())}
            | {"lengths": asdict(Spread.of(lengths)), "histogram": histogram(lengths, BINS)}
        )
    return found


def useful_share(batches: TokenBatches) -> float:
    """Return which share of the tokens in the first epoch's batches is no padding."""
    useful = padded = 0
    for step in range(1, min(batches.steps_per_epoch, SAMPLED_STEPS) + 1):
        for lines in batches.plan(step):
            widths = [int(batches.lengths[line].sum()) for line in lines]
            useful += sum(widths)
            padded += max(widths) * len(widths)
    return useful / padded


def spans(rows: Rows, index: int) -> list[tuple[list[int], bool]]:
    """Return a row as stretches of ids that are trained or not, in order."""
    row = rows[index]
    edges = np.flatnonzero(np.diff(np.asarray(row.trained, np.int8))) + 1
    pieces = np.split(np.asarray(row.ids), edges)
    flags = [bool(row.trained[start]) for start in [0, *edges.tolist()]]
    return [(piece.tolist(), flag) for piece, flag in zip(pieces, flags, strict=True)]
