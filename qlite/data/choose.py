"""Which encoded rows a run uses, and how: rows that are too long, windows of raw text, held-out rows, weights."""

from dataclasses import dataclass

import numpy as np

from qlite.data.encode import Encoded
from qlite.data.store import Rows, TokenStore

DROP, CUT_START, CUT_END = "drop", "cut_start", "cut_end"
"""What happens to a conversation longer than the limit."""


@dataclass(frozen=True)
class Cut:
    """Rows brought to a length, and what that cost."""

    rows: Rows
    long: np.ndarray
    """Numbers, in the store, of the conversations that were too long."""
    lost_tokens: int
    windows: int = 0
    """Windows that long raw texts were split into."""


def cut(store: TokenStore, tokens: int, long_rows: str = DROP, stride: int | None = None) -> Cut:
    """Return all of ``store`` in rows of at most ``tokens`` tokens.

    Raw text is split into windows that begin ``stride`` tokens apart (default: one behind the other); each token carries its
    loss in one window only. A conversation that is too long is dropped, or loses its start or its end.
    """
    is_text = np.array([source["format"] == "text" for source in store.meta["sources"]], bool)[store.source]
    is_long = store.length > tokens
    whole, long = np.flatnonzero(~is_long), np.flatnonzero(is_long & ~is_text)
    windows = _windows(store, np.flatnonzero(is_long & is_text), tokens, stride or tokens)
    parts = [Rows.whole(store, whole), windows]
    excess = store.length[long].astype(np.int64) - tokens
    if long_rows == DROP:
        lost = int(store.length[long].sum())
    else:
        start = excess if long_rows == CUT_START else np.zeros_like(excess)
        parts.append(Rows(store, long, start, start + tokens, np.zeros_like(excess)))
        lost = int(excess.sum())
    rows = _joined(parts)
    # A single token has nothing before it that could predict it.
    return Cut(rows.take(rows.lengths > 1), long, lost, len(windows))


def _windows(store: TokenStore, texts: np.ndarray, tokens: int, stride: int) -> Rows:
    row, start = [], []
    for text in texts:
        # The last window is the first to reach the end.
        begins = np.arange(0, max(1, store.length[text] - tokens + stride), stride)
        row.append(np.full(len(begins), text))
        start.append(begins)
    row = np.concatenate([np.zeros(0, np.int64), *row])
    start = np.concatenate([np.zeros(0, np.int64), *start])
    stop = np.minimum(start + tokens, store.length[row])
    return Rows(store, row, start, stop, np.where(start > 0, tokens - stride, 0))


def _joined(parts: list[Rows]) -> Rows:
    """Return all parts in the store's order."""
    names = ("row", "start", "stop", "context")
    columns = [np.concatenate([getattr(part, name) for part in parts]).astype(np.int64) for name in names]
    order = np.lexsort((columns[1], columns[0]))
    return Rows(parts[0].store, *(column[order] for column in columns))


def hold_out(rows: Rows, count: int) -> tuple[Rows, Rows, int]:
    """Return (training rows, held-out rows, training rows dropped for being equal to a held-out one).

    Held out are the ``count`` rows of the smallest digests: as good as drawn at random, the same on every machine and in every
    order of the file, and a row that is added later moves at most one of them.
    """
    order = np.argsort(rows.digests, kind="stable")
    held = rows.take(order[:count])
    rest = np.sort(order[count:])
    is_equal = np.isin(rows.digests[rest], held.digests)
    return rows.take(rest[~is_equal]), held, int(is_equal.sum())


def weighted(rows: Rows, weights: list[float]) -> Rows:
    """Return ``rows`` with each as often as the weight of its source says; of a fraction, those of the smallest digests."""
    if all(weight == 1 for weight in weights):
        return rows
    weight = np.array(weights)[rows.store.source[rows.row]]
    # A digest as a number in [0, 1): the same rows are taken on every machine.
    share = (rows.digests.view(np.uint64) >> np.uint64(11)).astype(np.float64) / 2**53
    times = np.floor(weight).astype(np.int64) + (share < weight % 1)
    return rows.take(np.repeat(np.arange(len(rows)), times))


def without_end(rows: Rows, long: np.ndarray, stop_ids: list[int]) -> np.ndarray:
    """Return which of ``rows``, shortened from the conversations ``long``, have lost the token that generation stops at."""
    shortened = np.flatnonzero(np.isin(rows.row, long))
    return np.array([index for index in shortened if not _ends(rows[index], stop_ids)], np.int64)


def _ends(row: Encoded, stop_ids: list[int]) -> bool:
    trained = np.flatnonzero(row.trained)
    return len(trained) > 0 and row.ids[trained[-1]] in stop_ids
