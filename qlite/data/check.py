"""What would silently spoil a training: rows that are too long, that teach nothing, that never end, that carry control tokens."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from qlite.data.choose import CUT_END, DROP, without_end
from qlite.data.encode import Encoder
from qlite.data.store import Rows, TokenStore

if TYPE_CHECKING:
    from qlite.data.dataset import Data, DataSet, Part

LONG_SHARE = 0.01
"""Share of conversations that may be longer than the limit without a word of the recipe's."""


def problems(part: Part, data: Data, encoder: Encoder, tokens: int) -> list[str]:
    """Return what is wrong with ``part`` and not allowed by name in ``data.allow``: each with key, rows and fix."""
    left = part.meta["left"]
    found = {
        "long": _long(part, data, tokens),
        "untrained": _untrained(part),
        "unended": _unended(part, data, encoder),
        "control": _control(part, left["control"]),
    }
    return [f'{text}. To go on all the same: data.allow = ["{name}"]' for name, text in found.items() if text and name not in data.allow]


def _long(part: Part, data: Data, tokens: int) -> str | None:
    store, long = part.rows.store, part.cut.long
    if len(long) <= LONG_SHARE * part.read:
        return None
    enough = int(np.quantile(store.length, 1 - LONG_SHARE, method="higher"))
    return (
        f"train.tokens = {tokens}: {share(len(long), part.read)} of {part.key} are longer and would be "
        f"{'left out' if data.long_rows == DROP else 'cut'}, first {_names([store.where(row) for row in long])}; {enough} would hold 99 %"
    )


def _untrained(part: Part) -> str | None:
    count, first = untrained(part)
    if not count:
        return None
    return (
        f"{part.key}: {share(count, part.read)} have no token to learn (an empty answer, one that is switched off, or one that is cut off "
        f"at train.tokens), first {_names(first)}; mend them, or they are left out"
    )


def untrained(part: Part) -> tuple[int, list[str]]:
    """Return how many rows teach nothing, as they stand or as they are cut, and where the first ones stand."""
    left, cut = part.meta["left"]["untrained"], part.cut.untrained
    return left["count"] + len(cut), [*left["first"], *(part.rows.store.where(row) for row in cut[:2])]


def _unended(part: Part, data: Data, encoder: Encoder) -> str | None:
    left = part.meta["left"]["unended"]
    if left["count"]:
        return (
            f"{part.key}: {share(left['count'], part.read)} do not end their answer with a token that generation stops at, "
            f"first {_names(left['first'])}: the model would learn not to stop; choose another data.template"
        )
    if data.long_rows != CUT_END or not len(rows := without_end(part.rows, part.cut.long, encoder.stop_ids)):
        return None
    return (
        f'data.long_rows = "cut_end": {share(len(rows), part.read)} of {part.key} lose the token that ends the answer, '
        f"first {_names([part.rows.where(row) for row in rows])}: the model would learn not to stop; raise train.tokens, or drop them"
    )


def _control(part: Part, left: dict) -> str | None:
    if not left["count"]:
        return None
    return (
        f"{part.key}: {share(left['count'], part.read)} have a token of the model's own in their text, first {_names(left['first'])}: "
        'it would be taken for what it means, not for text. If the chat template is applied already, the rows are format = "text"'
    )


def nothing_left(key: str, meta: dict) -> str:
    """Return why none of the rows that were read can be trained on."""
    left = {name: meta["left"][name] for name in ("untrained", "bad")}
    what = {"untrained": "have no token to learn (an empty answer, or one that is switched off)", "bad": "do not fit their format"}
    counted = [f"{part['count']:,} {what[name]}, first {_names(part['first'])}" for name, part in left.items() if part["count"]]
    return f"{key}: no row is left to train on: {'; '.join(counted)}"


def _trained_of_sources(before: Rows, after: Rows, count: int) -> list[tuple[int, int]]:
    """Return for each source how many rows it has, and how many are trained in an epoch."""
    each = [np.bincount(rows.store.source[rows.row], minlength=count).tolist() for rows in (before, after)]
    return list(zip(*each, strict=True))


def describe_weights(before: Rows, after: Rows, weights: list[float], part: Part) -> list[str]:
    """Return in words what the weights of sources make of them."""
    counts = _trained_of_sources(before, after, len(weights))
    each = zip(part.paths, weights, counts, strict=True)
    return [f"{part.key}: {_shortest(path)} has weight {w:g}: {m:,} rows an epoch of its {n:,}" for path, w, (n, m) in each if w != 1]


def unweighted(before: Rows, after: Rows, weights: list[float], part: Part) -> list[str]:
    """Return the problem of sources of which their weight leaves nothing."""
    counts = _trained_of_sources(before, after, len(weights))
    return [
        f"{part.key}[{index}].weight = {weight:g}: leaves none of the {n:,} rows of {_shortest(path)}; raise it, or remove the source"
        for index, (path, weight, (n, m)) in enumerate(zip(part.paths, weights, counts, strict=True), start=1)
        if n and not m
    ]


def too_short(key: str, store: TokenStore, tokens: int) -> str:
    """Return that no row fits into ``tokens`` with an answer to learn, and how many would be enough."""
    low, half, most = (int(np.quantile(store.length, q, method="higher")) for q in (0, 0.5, 0.99))
    return (
        f"train.tokens = {tokens}: {key} has no row with an answer that is that short. The shortest has {low} tokens, half have at most "
        f"{half}, 99 % at most {most}; raise it"
    )


def describe(data: DataSet) -> list[str]:
    """Return in words what was found and what is left out."""
    lines = [line for part in data.parts for line in described(part)]
    both = int(np.isin(data.test.digests, data.train.digests).sum())
    if both:
        lines.append(f"data: {share(both, len(data.test))} held out are training rows, too: they measure memory")
    encoder = data.encoder
    if encoder.template is not None and encoder.begins_with_token and data.train[0].ids[0] != encoder.tokenizer.bos_token_id:
        lines.append(
            f"data.template: it writes no {encoder.tokenizer.bos_token}, with which this tokenizer begins every text; "
            "if the model was trained with it, add {{ bos_token }} in front"
        )
    total, trained = int(data.train.lengths.sum()), int(data.train.trained_counts.sum())
    mean = f"{total / len(data.train):.0f} tokens a row, {trained / total:.0%} of them trained"
    return [*lines, f"data: {len(data.train):,} training rows, {len(data.test):,} held out; {mean}"]


def described(part: Part) -> list[str]:
    """Return in words where a part's rows come from and which are left out."""
    left, long = part.meta["left"], part.cut.long
    lines = []
    for source, path in zip(part.meta["sources"], part.paths, strict=True):
        found = " (found from its first rows)" if source["is_detected"] else ""
        lines.append(f'{part.key}: {source["rows"]:,} rows of {_shortest(path)} in format "{source["format"]}"{found}')
    told = {
        "have nothing to learn and are left out": untrained(part),
        "do not fit their format and are left out": (left["bad"]["count"], left["bad"]["first"]),
        "became several rows, because the template rewrites earlier turns": (left["split"]["count"], left["split"]["first"]),
    }
    for reason, (count, first) in told.items():
        if count:
            lines.append(f"{part.key}: {share(count, part.read)} {reason}, first {_names(first)}")
    if len(long):
        lines.append(
            f"{part.key}: {share(len(long), part.read)} are longer than train.tokens; {part.cut.lost_tokens:,} tokens are left out"
        )
    if part.cut.windows:
        lines.append(f"{part.key}: long texts are split into {part.cut.windows:,} windows")
    if part.dropped:
        lines.append(f"{part.key}: {part.dropped:,} rows are equal to held-out ones, or overlap them, and are not trained")
    return lines


def share(count: int, total: int) -> str:
    """Return "28 of 52,002 rows (0.05 %)"."""
    return f"{count:,} of {total:,} rows ({100 * count / max(1, total):.3g} %)"


def _shortest(path: str) -> str:
    """Return a local path as seen from the present folder, where that is shorter."""
    with suppress(ValueError):  # Windows: on another drive
        return min(path, os.path.relpath(path), key=len)
    return path


def _names(wheres: list[str]) -> str:
    return " and ".join(wheres[:2])
