"""Packing loses no row, fills no line beyond its capacity, and needs few lines more than there must be."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qlite.data.pack import pack

capacities = st.integers(1, 200)


@given(capacities.flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_every_row_is_in_one_line_and_no_line_is_too_long(given_rows):
    capacity, lengths = given_rows
    lines = pack(np.array(lengths, int), capacity)
    assert sorted(row for line in lines for row in line) == list(range(len(lengths)))
    assert all(0 < sum(lengths[row] for row in line) <= capacity for line in lines)


@given(capacities.flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1, max_size=60))))
def test_at_most_one_line_is_less_than_half_full(given_rows):
    # Two lines of at most half could have been one: what best fit never leaves behind, and so at most twice the fewest lines.
    capacity, lengths = given_rows
    lines = pack(np.array(lengths, int), capacity)
    assert sum(2 * sum(lengths[row] for row in line) <= capacity for line in lines) <= 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.randoms())
def test_how_many_lines_there_are_does_not_depend_on_the_order(lengths, chance):
    shuffled = list(lengths)
    chance.shuffle(shuffled)
    assert len(pack(np.array(lengths), 50)) == len(pack(np.array(shuffled), 50))


def test_instruction_like_lengths_fill_99_percent():
    # Mean about 110 with a long tail, as instruction sets have.
    lengths = np.clip(np.random.default_rng(0).lognormal(4.4, 0.8, 5000), 8, 512).astype(int)
    lines = pack(lengths, 512)
    assert lengths.sum() / (512 * len(lines)) > 0.99


def test_the_best_place_is_the_tightest_one():
    assert pack(np.array([6, 5, 4, 3]), 10) == [[0, 2], [1, 3]]
