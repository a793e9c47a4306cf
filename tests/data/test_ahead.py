"""Batches made ahead are the batches, in order, and what goes wrong in the thread is told where it is asked for."""

import threading

import pytest
import torch

from qlite.data.ahead import Ahead
from qlite.data.batches import TokenBatches
from qlite.data.encode import Encoded
from qlite.errors import DataError

ROWS = [Encoded([number] * (number % 7 + 2), [True] * (number % 7 + 2)) for number in range(50)]


def batches(**changes: object) -> TokenBatches:
    return TokenBatches(ROWS, **{"micro_batch": 2, "accumulation": 2, "seed": 3, "pad_id": 0, **changes})


@pytest.mark.parametrize("pack_tokens", [None, 16])
@pytest.mark.parametrize("first", [1, 7])
def test_they_are_the_batches_of_each_step_from_any_step_on(pack_tokens, first):
    ahead, plain = Ahead(batches(pack_tokens=pack_tokens), 30), batches(pack_tokens=pack_tokens)
    for step in range(first, 31):
        for made, right in zip(ahead.step(step), plain.step(step), strict=True):
            assert torch.equal(made.input_ids, right.input_ids)
            assert torch.equal(made.labels, right.labels)


def test_the_next_step_is_made_while_this_one_is_computed_and_none_after_the_last():
    made, threads, rows = [], set(), batches()

    class Watched:
        def step(self, number: int) -> list:
            made.append(number)
            threads.add(threading.current_thread())
            return rows.step(number)

    ahead = Ahead(Watched(), 3)
    ahead.step(1)
    ahead._next[1].result()
    assert made == [1, 2]
    ahead.step(2), ahead.step(3)
    assert made == [1, 2, 3]
    assert threading.main_thread() not in threads


def test_a_row_that_cannot_be_read_stops_the_step_that_needs_it():
    class Broken:
        def step(self, number: int) -> list:
            if number == 2:
                raise DataError("rows.jsonl: line 9: is gone")
            return []

    ahead = Ahead(Broken(), 5)
    assert ahead.step(1) == []
    with pytest.raises(DataError, match="line 9"):
        ahead.step(2)
