"""The order of rows is a function of seed and step; every row comes once an epoch; padding carries no label."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from qlite.data.batches import Batch, TokenBatches
from qlite.data.encode import IGNORED, Encoded
from tests.tiny import random_rows


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_every_row_comes_exactly_once_an_epoch(count, micro_batch, accumulation, seed):
    rows = [Encoded([i + 1, i + 1], [True, True]) for i in range(count)]
    batches = TokenBatches(rows, micro_batch, accumulation, seed, pad_id=0)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch + 1, (epoch + 1) * batches.steps_per_epoch + 1)
        micro = [batch for step in steps for batch in batches.step(step)]
        assert sorted(int(row[0]) for batch in micro for row in batch.input_ids) == list(range(1, count + 1))
        assert all(len(batch.input_ids) <= micro_batch for batch in micro)


def test_epochs_have_different_orders_and_seeds_too():
    rows = [Encoded([i, i], [True, True]) for i in range(64)]

    def first(seed, step):
        return sorted(TokenBatches(rows, 4, 1, seed, 0).step(step)[0].input_ids[:, 0].tolist())

    assert first(0, 1) == first(0, 1)
    assert first(0, 1) != first(1, 1)
    assert first(0, 1) != first(0, 17)


def test_a_batch_is_padded_on_the_right_without_labels():
    batch = Batch.of([Encoded([5, 6, 7], [False, True, True]), Encoded([8], [True])], pad_id=9)
    assert torch.equal(batch.input_ids, torch.tensor([[5, 6, 7], [8, 9, 9]]))
    assert torch.equal(batch.labels, torch.tensor([[IGNORED, 6, 7], [8, IGNORED, IGNORED]]))
    assert batch.tokens == 4
    assert batch.trained_tokens == 2  # nothing comes before the 8


def test_rows_of_like_length_share_a_micro_batch():
    batches = TokenBatches(random_rows(64, (1, 60)), 8, 8, 0, 0)
    widths = [batch.input_ids.shape[1] for batch in batches.step(1)]
    assert widths == sorted(widths, reverse=True)
    assert sum(batch.input_ids.numel() for batch in batches.step(1)) < 1.2 * sum(batch.tokens for batch in batches.step(1))
