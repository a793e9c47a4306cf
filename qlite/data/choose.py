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
    untrained: np.ndarray
    """Of those, the ones of which nothing is left to learn."""
    windows: int = 0
    """Windows that long raw texts were split into."""


def cut(store: TokenStore, tokens: int, long_rows: str = DROP, stride: int | None = None) -> Cut:
    """Return all of ``store`` in rows of at most ``tokens`` tokens.

    Raw text is split into windows that begin ``stride`` tokens apart (default: one behind the other); each token carries its
    loss in one window only. A conversation that is too long is dropped, or loses its start or its end.
    """
    is_long = store.length > tokens
    whole, long = np.flatnonzero(~is_long), np.flatnonzero(is_long & ~store.is_text)
    windows = _windows(store, np.flatnonzero(is_long & store.is_text), tokens, stride or tokens)
    parts = [Rows.whole(store, whole), windows]
    excess = store.length[long].astype(np.int64) - tokens
    if long_rows == DROP:
        lost = int(store.length[long].sum())
    else:
        start = excess if long_rows == CUT_START else np.zeros_like(excess)
        parts.append(Rows(store, long, start, start + tokens, np.zeros_like(excess)))
        lost = int(excess.sum())
    rows = _joined(parts)
    teaches = np.ones(len(rows), bool)
    for index in np.flatnonzero(np.isin(rows.row, long) | (rows.lengths < 2)):
        # A row's first token has nothing before it that could predict it.
        teaches[index] = np.any(rows[index].trained[1:])
    return Cut(rows.take(teaches), long, lost, np.unique(rows.row[~teaches]), len(windows))


def _windows(store: TokenStore, texts: np.ndarray, tokens: int, stride: int) -> Rows:
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for text in texts:
        length = int(store.length[text])
        # The last window is the first to reach the end; of a single token it would have nothing to predict that from.
        begin = np.arange(0, max(1, length - tokens + stride), stride)
        begin[-1] = min(begin[-1], length - 2)
        stop = np.minimum(begin + tokens, length)
        context = np.concatenate([[0], np.maximum(0, stop[:-1] - begin[1:])])
        for column, values in zip(columns, (np.full(len(begin), text), begin, stop, context), strict=True):
            column.append(values)
    return Rows(store, *(np.concatenate([np.zeros(0, np.int64), *column]) for column in columns))


def _joined(parts: list[Rows]) -> Rows:
    """Return all parts in the store's order."""
    names = ("row", "start", "stop", "context")
    columns = [np.concatenate([getattr(part, name) for part in parts]).astype(np.int64) for name in names]
    order = np.lexsort((columns[1], columns[0]))
    return Rows(parts[0].store, *(column[order] for column in columns))


@dataclass(frozen=True)
class Split:
    """Training and held-out rows that have nothing to do with each other."""

    train: Rows
    held: Rows
    dropped: int
    """Rows in neither: equal to a held-out one, or windows that overlap one."""


def hold_out(rows: Rows, count: int) -> Split:
    """Hold out ``count`` of ``rows``, or a few more: what became of one conversation stays together.

    Taken are those of the smallest digests: as good as drawn at random, the same on every machine and in every order of the
    file, and a row that is added later moves at most one of them.
    """
    group = _groups(rows)
    smallest = np.full(group.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, group, rows.digests)
    size = np.bincount(group)
    order = np.argsort(smallest, kind="stable")
    # Groups as long as the ones before them are fewer than ``count`` rows.
    is_taken = np.zeros(len(size), bool)
    is_taken[order] = np.cumsum(size[order]) - size[order] < count
    is_held = is_taken[group]
    held = rows.take(np.flatnonzero(is_held)[np.argsort(smallest[group[is_held]], kind="stable")])
    is_near = np.isin(rows.digests, held.digests) | _overlaps(rows, held)
    return Split(rows.take(~is_held & ~is_near), held, int((~is_held & is_near).sum()))


def _groups(rows: Rows) -> np.ndarray:
    """Return a number for each row that those of one conversation share. A text's windows are each their own."""
    store = rows.store
    is_text = store.is_text[rows.row]
    places = np.stack([store.source[rows.row], store.file[rows.row], store.number[rows.row], np.where(is_text, rows.row, -1)])
    places = np.concatenate([places, np.where(is_text, rows.start, -1)[None]])
    return np.unique(places, axis=1, return_inverse=True)[1].reshape(-1)


def _overlaps(rows: Rows, held: Rows) -> np.ndarray:
    """Return which of ``rows`` share tokens with one of ``held``: windows of one text."""
    near = np.zeros(len(rows), bool)
    for row in np.unique(held.row[held.store.is_text[held.row]]):
        mine, theirs = np.flatnonzero(rows.row == row), held.row == row
        begins, ends = held.start[theirs], held.stop[theirs]
        near[mine] = [bool(((rows.start[i] < ends) & (rows.stop[i] > begins)).any()) for i in mine]
    return near


def weighted(rows: Rows, weights: list[float]) -> Rows:
    """Return ``rows`` with each as often as the weight of its source says; of a fraction, a share that is the same on every machine."""
    if all(weight == 1 for weight in weights):
        return rows
    weight = np.array(weights)[rows.store.source[rows.row]]
    # Mixed anew (splitmix64): the digests themselves decide already what is held out.
    mixed = rows.digests.view(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    share = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53
    times = np.floor(weight).astype(np.int64) + (share < weight % 1)
    return rows.take(np.repeat(np.arange(len(rows)), times))


def without_end(rows: Rows, long: np.ndarray, stop_ids: list[int]) -> np.ndarray:
    """Return which of ``rows``, shortened from the conversations ``long``, have lost the token that generation stops at."""
    shortened = np.flatnonzero(np.isin(rows.row, long))
    return np.array([index for index in shortened if not _ends(rows[index], stop_ids)], np.int64)


def _ends(row: Encoded, stop_ids: list[int]) -> bool:
    trained = np.flatnonzero(row.trained)
    return len(trained) > 0 and row.ids[trained[-1]] in stop_ids
