"""The allocator's rules, on cases computed by hand from its source, and what holds for any log."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlite.memory.allocator import reserved_bytes
from qlite.units import KIB, MIB


def log(*steps: tuple[str, float] | str) -> list:
    """Return events: ("a", 3) allocates 3 MiB as a, "a" frees it."""
    return [(ord(step), None) if isinstance(step, str) else (ord(step[0]), round(step[1] * MIB)) for step in steps]


@pytest.mark.parametrize(
    ("size", "reserved", "expandable"),
    [
        (1, 2 * MIB, 2 * MIB),
        (1 * MIB, 2 * MIB, 2 * MIB),
        (1 * MIB + 1, 20 * MIB, 20 * MIB),
        (10 * MIB - 512, 20 * MIB, 20 * MIB),
        (10 * MIB, 10 * MIB, 20 * MIB),
        (10 * MIB + 1, 12 * MIB, 20 * MIB),
        (21 * MIB, 22 * MIB, 40 * MIB),
        (0, 0, 0),
    ],
)
def test_one_allocation_asks_for_one_segment(size, reserved, expandable):
    assert reserved_bytes([(0, size)]) == reserved
    assert reserved_bytes([(0, size)], expandable=True) == expandable


def test_small_tensors_share_a_segment_in_blocks_of_512_bytes():
    assert reserved_bytes([(key, 1) for key in range(4096)]) == 2 * MIB
    assert reserved_bytes([(key, 1) for key in range(4097)]) == 4 * MIB
    assert reserved_bytes([(key, 513) for key in range(4096)]) == 4 * MIB


def test_small_and_large_do_not_share():
    assert reserved_bytes([(0, MIB + 1), (1, MIB)]) == 22 * MIB


def test_a_freed_block_is_used_again_and_its_segment_stays():
    assert reserved_bytes(log(("a", 30), "a", ("b", 30))) == 30 * MIB
    assert reserved_bytes(log(("a", 30), "a", ("b", 12), ("c", 18))) == 30 * MIB
    assert reserved_bytes(log(("a", 30), "a")) == 30 * MIB


def test_a_rest_of_one_mib_stays_with_a_large_block_and_a_larger_one_is_split_off():
    # 4 times 5 MiB fill 20 MiB; of 19 MiB 1 MiB is left to the block, so that 2 MiB more need another segment.
    assert reserved_bytes(log(("a", 5), ("b", 5), ("c", 5), ("d", 5))) == 20 * MIB
    assert reserved_bytes(log(("a", 20), "a", ("b", 19), ("c", 2))) == 40 * MIB
    assert reserved_bytes(log(("a", 20), "a", ("b", 18), ("c", 2))) == 20 * MIB


def test_free_neighbours_join_within_a_segment_only():
    assert reserved_bytes(log(("a", 5), ("b", 5), ("c", 5), ("d", 5), "b", "c", ("e", 10))) == 20 * MIB
    assert reserved_bytes(log(("a", 5), ("b", 5), ("c", 5), ("d", 5), "a", "c", ("e", 10))) == 30 * MIB
    assert reserved_bytes(log(("a", 10), ("b", 10), "a", "b", ("c", 20))) == 40 * MIB


def test_the_smallest_block_that_fits_is_taken():
    # 12 goes into the 14, not into the 30 that was freed first: so that 30 still fits.
    assert reserved_bytes(log(("a", 30), ("b", 14), "a", "b", ("c", 12), ("d", 30))) == 44 * MIB


def test_a_step_may_reserve_more_when_it_runs_again():
    """12 goes into half of the 30 at first, and into the 14 the second time: then 18 leaves only 12 of the 30 for the 13."""
    step = log(("y", 30), "y", ("x", 12), ("z", 18), ("w", 13), "x", "z", "w")
    assert reserved_bytes(step) == 44 * MIB
    assert reserved_bytes(step * 2) == 58 * MIB
    assert reserved_bytes(step * 3) == reserved_bytes(step * 9) == 58 * MIB


def test_an_expandable_segment_grows_at_its_end_by_whole_pages():
    # 30 are in 40; its last 10 and 20 more hold the next 30.
    assert reserved_bytes(log(("a", 30), ("b", 30)), expandable=True) == 60 * MIB
    # Without: 18 needs a segment of its own, as the two free ones of 10 do not join.
    blocks = log(("a", 10), ("b", 10), "a", "b", ("c", 18))
    assert reserved_bytes(blocks) == 38 * MIB
    assert reserved_bytes(blocks, expandable=True) == 20 * MIB


def test_an_expandable_segment_splits_large_blocks_to_the_last_512_bytes():
    almost = [(0, 20 * MIB - 1536 * KIB), (1, 1536 * KIB)]
    assert reserved_bytes(almost, expandable=True) == 20 * MIB
    nearly = [(0, 20 * MIB), (0, None), (0, 20 * MIB - 1025 * KIB + 512), (1, 1025 * KIB - 512)]
    assert reserved_bytes(nearly, expandable=True) == 20 * MIB


def test_an_expandable_segments_end_is_used_last():
    # 6 goes into the hole of 12, though the end (8 free) would fit closer; so 12 more make it grow.
    events = log(("a", 12), ("b", 20), "a", ("c", 6))
    assert reserved_bytes(events, expandable=True) == 40 * MIB
    assert reserved_bytes([*events, *log(("d", 8), ("e", 6))], expandable=True) == 40 * MIB
    assert reserved_bytes([*events, *log(("d", 12))], expandable=True) == 60 * MIB


def test_the_free_of_what_came_before_the_log_is_passed_over():
    assert reserved_bytes([(1, None), (2, MIB)]) == 2 * MIB


SIZES = st.one_of(st.integers(0, 4 * KIB), st.integers(0, 3 * MIB), st.integers(9 * MIB, 50 * MIB))


@st.composite
def logs(draw) -> list:
    """Return a log of up to 60 allocations, freed in any order, all of them in the end."""
    events, living = [], []
    for key, size in enumerate(draw(st.lists(SIZES, max_size=60))):
        events.append((key, size))
        living.append(key)
        while living and draw(st.booleans()):
            events.append((living.pop(draw(st.integers(0, len(living) - 1))), None))
    return events + [(key, None) for key in living]


def peak(events: list) -> int:
    sizes, now, most = {}, 0, 0
    for key, size in events:
        now += (sizes.setdefault(key, -(-size // 512) * 512)) if size is not None else -sizes[key]
        most = max(most, now)
    return most


@given(logs(), st.booleans())
def test_reserved_is_between_the_peak_and_a_segment_for_each_allocation(events, expandable):
    reserved = reserved_bytes(events, expandable)
    alone = sum(reserved_bytes([(key, size)], expandable) for key, size in events if size is not None)
    assert peak(events) <= reserved <= alone
    assert reserved % (2 * MIB) == 0


@given(logs())
def test_an_expandable_log_that_ends_empty_reserves_nothing_more_when_repeated(events):
    assert reserved_bytes(events * 3, expandable=True) == reserved_bytes(events, expandable=True)


@given(logs())
def test_what_is_freed_joins_to_whole_segments(events):
    """After a log that ends empty, its largest segment can be had again for nothing."""
    largest = max((reserved_bytes([(0, size)]) for _, size in events if size and size > MIB), default=0)
    assert reserved_bytes([*events, (-1, largest)]) == reserved_bytes(events)


def test_a_hundred_thousand_events_take_about_a_second():
    chance = random.Random(0)
    events, living = [], []
    for key in range(50_000):
        events.append((key, chance.choice((600, 40_000, 3 * MIB, chance.randrange(60 * MIB)))))
        living.append(key)
        if len(living) > 1000:
            events.append((living.pop(chance.randrange(len(living))), None))
    started = time.perf_counter()
    reserved_bytes(events)
    reserved_bytes(events, expandable=True)
    assert time.perf_counter() - started < 4
