"""The order of rows is a function of seed and step; every row comes once an epoch; padding carries no label."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlite.data.batches import Batch, TokenBatches
from qlite.data.encode import IGNORED, Encoded
from tests.tiny import random_rows


def numbered(lengths: list[int]) -> list[Encoded]:
    """Return rows of these lengths; all tokens of a row are its number, counted from 1, and all are trained."""
    return [Encoded([i] * length, [True] * length) for i, length in enumerate(lengths, start=1)]


def epoch(batches: TokenBatches, number: int) -> list[list[Batch]]:
    return [batches.step(number * batches.steps_per_epoch + step) for step in range(1, batches.steps_per_epoch + 1)]


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@given(lengths, st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.booleans())
@settings(deadline=None)
def test_every_row_comes_exactly_once_an_epoch(sizes, micro_batch, accumulation, seed, packing):
    batches = TokenBatches(numbered(sizes), micro_batch, accumulation, seed, 0, 30 if packing else None)
    for number in range(3):
        steps = epoch(batches, number)
        seen = [int(token) for step in steps for batch in step for token in batch.input_ids.flatten() if token]
        assert sorted(seen) == sorted(i for i, size in enumerate(sizes, start=1) for _ in range(size))
        assert all(1 <= len(batch.input_ids) <= micro_batch for step in steps for batch in step)
        assert all(1 <= len(step) <= accumulation for step in steps)
        assert sum(batch.tokens for step in steps for batch in step) == sum(sizes)


@given(lengths, st.integers(1, 3), st.booleans())
@settings(deadline=None)
def test_the_largest_micro_batch_comes_first(sizes, micro_batch, packing):
    batches = TokenBatches(numbered(sizes), micro_batch, 2, 0, 0, 30 if packing else None)
    sizes_seen = [batch.input_ids.numel() for step in epoch(batches, 0) for batch in step]
    assert sizes_seen[0] == max(sizes_seen)


def test_epochs_have_different_orders_and_seeds_too():
    rows = numbered([2] * 64)

    def first(seed, step):
        return sorted(TokenBatches(rows, 4, 1, seed, 0).step(step)[0].input_ids[:, 0].tolist())

    assert first(0, 1) == first(0, 1)
    assert first(0, 1) != first(1, 1)
    assert first(0, 1) != first(0, 17)


def test_a_step_can_be_asked_for_in_any_order():
    rows = random_rows(50, (1, 40))
    one, other = TokenBatches(rows, 2, 2, 3, 0, 64), TokenBatches(rows, 2, 2, 3, 0, 64)
    forward = [one.plan(step) for step in range(1, 40)]
    backward = [other.plan(step) for step in range(39, 0, -1)]
    assert forward == backward[::-1]


def test_a_batch_is_padded_on_the_right_without_labels():
    batch = Batch.of([Encoded([5, 6, 7], [False, True, True]), Encoded([8], [True])], pad_id=9)
    assert torch.equal(batch.input_ids, torch.tensor([[5, 6, 7], [8, 9, 9]]))
    assert torch.equal(batch.labels, torch.tensor([[IGNORED, 6, 7], [IGNORED, IGNORED, IGNORED]]))
    assert batch.tokens == 4
    assert batch.trained_tokens == 2  # nothing comes before the 8
    assert batch.position_ids is None


def test_a_packed_batch_counts_positions_anew_and_no_row_predicts_the_next_ones_first_token():
    a, b, c = Encoded([1, 2, 3], [False, True, True]), Encoded([4, 5], [True, True]), Encoded([6, 7], [True, True])
    batch = Batch.packed([[a, b], [c]], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch.labels.tolist() == [[IGNORED, 2, 3, IGNORED, 5], [IGNORED, 7, IGNORED, IGNORED, IGNORED]]
    assert batch.trained_tokens == 4


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12))
@settings(deadline=None)
def test_pad_carries_no_label_even_where_it_is_the_end_token(sizes):
    end = 9
    rows = [Encoded([1] * (size - 1) + [end], [True] * size) for size in sizes]
    for batch in (Batch.of(rows, end), Batch.packed([rows[::2], rows[1::2]] if len(rows) > 1 else [rows], end)):
        assert int((batch.labels == end).sum()) == sum(size > 1 for size in sizes)  # a row of one token has nothing before it
        assert batch.tokens == sum(sizes)


def test_rows_of_like_length_share_a_micro_batch():
    batches = TokenBatches(random_rows(64, (1, 60)), 8, 8, 0, 0)
    widths = [batch.input_ids.shape[1] for batch in batches.step(1)]
    assert widths == sorted(widths, reverse=True)
    assert sum(batch.input_ids.numel() for batch in batches.step(1)) < 1.2 * sum(batch.tokens for batch in batches.step(1))


def test_without_accumulation_rows_are_grouped_by_length_over_many_steps():
    rows = random_rows(512, (1, 200))
    batches = TokenBatches(rows, 4, 1, 0, 0)
    padded = sum(batch.input_ids.numel() for step in epoch(batches, 0) for batch in step)
    assert sum(len(row) for row in rows) / padded > 0.9
    # And yet the steps' lengths come in no order.
    widths = np.array([step[0].input_ids.shape[1] for step in epoch(batches, 0)])
    assert abs(np.corrcoef(widths, np.arange(len(widths)))[0, 1]) < 0.3


@pytest.mark.parametrize("packing", [True, False])
def test_steps_per_epoch_are_those_there_are(packing):
    batches = TokenBatches(random_rows(101, (1, 60)), 2, 3, 0, 0, 64 if packing else None)
    for number in range(2):
        micro_batches = len(batches._epoch(number))
        assert -(-micro_batches // 3) == batches.steps_per_epoch


def documents(batch: Batch) -> list[list[tuple[int, int]]]:
    """Return (token, label) of every document of ``batch``, line after line; padding left out."""
    found = []
    for line, length in enumerate(batch.lengths):
        positions = torch.arange(batch.input_ids.shape[1]) if batch.position_ids is None else batch.position_ids[line]
        for place in range(length):
            if positions[place] == 0:
                found.append([])
            found[-1].append((int(batch.input_ids[line, place]), int(batch.labels[line, place])))
            assert positions[place] == len(found[-1]) - 1
    return found


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=5), st.booleans(), st.integers(0, 99))
@settings(deadline=None)
def test_halves_hold_the_same_documents_and_are_as_narrow_as_these(shape, packing, seed):
    generator = np.random.default_rng(seed)
    lines = [[Encoded(generator.integers(0, 9, n).tolist(), (generator.random(n) < 0.5).tolist()) for n in line] for line in shape]
    rows = [row for line in lines for row in line]
    batch = Batch.packed(lines, 0) if packing else Batch.of(rows, 0)
    halves = batch.halves()
    assert (halves is None) == (len(rows) == 1)
    if halves is None:
        return
    assert documents(halves[0]) + documents(halves[1]) == documents(batch)
    assert sum(half.tokens for half in halves) == batch.tokens
    assert sum(half.trained_tokens for half in halves) == batch.trained_tokens
    assert np.concatenate([half.targets for half in halves]).tolist() == batch.targets.tolist()
    for half in halves:
        assert half.size == len(half.lengths) * max(half.lengths)
        assert half.input_ids.shape == half.labels.shape
    if len(batch.lengths) > 1:
        assert len(halves[0].lengths) - len(halves[1].lengths) in (0, 1)


def test_a_single_line_is_cut_between_the_documents_nearest_its_middle():
    rows = numbered([3, 9, 2, 5, 4])
    one, other = Batch.packed([rows], 0).halves()
    assert [one.lengths, other.lengths] == [(12,), (11,)]
    assert one.input_ids.tolist() == [[1] * 3 + [2] * 9]
    assert other.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert Batch.packed([numbered([7])], 0).halves() is None
    assert Batch.of(numbered([7]), 0).halves() is None


@given(st.integers(1, 3), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
@settings(deadline=None)
def test_targets_and_their_places_are_those_of_the_labels(lines, width, share, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 50, (lines, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) > share] = IGNORED
    batch = Batch(labels, labels, (width,) * lines)
    expected = [(b * width + t - 1, int(labels[b, t])) for b in range(lines) for t in range(1, width) if labels[b, t] != IGNORED]
    assert list(zip(batch.predicts.tolist(), batch.targets.tolist(), strict=True)) == expected
    assert batch.trained_tokens == len(expected)
