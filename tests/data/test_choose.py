"""No row is longer than the limit, no token is trained twice or lost unsaid, and held-out rows stay out of training."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlite.data.choose import CUT_END, CUT_START, DROP, cut, hold_out, weighted, without_end
from qlite.data.encode import Encoded
from qlite.data.store import Rows, TokenStore, writing_store

END = 7
CHAT, TEXT = 0, 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A counter of fresh folders."""
    root = tmp_path_factory.mktemp("stores")
    return (root / str(number) for number in range(10**6))


def store_of(rows: list[Encoded], folder, kinds: list[int] | None = None) -> TokenStore:
    with writing_store(folder) as (writer, meta):
        for number, row in enumerate(rows, start=1):
            writer.add(row, kinds[number - 1] if kinds else CHAT, 0, number)
        meta |= {"sources": [{"format": "prompt"}, {"format": "text"}], "files": [["a.jsonl", "line"]]}
    return TokenStore(folder)


def chat_row(length: int, first: int = 10) -> Encoded:
    """Return a row whose later half is the answer, ended by END."""
    start = length // 2
    ids = [*range(first, first + length - 1), END]
    return Encoded(ids, [i >= start for i in range(length)], start)


sizes = st.lists(st.integers(2, 60), min_size=1, max_size=12)


def test_what_is_stored_is_read_back(folders):
    rows = [chat_row(5), Encoded([0, 1, 2], [False, True, False]), Encoded([3], [True])]
    store = store_of(rows, next(folders))
    for row, read in zip(rows, Rows.whole(store, np.arange(3)), strict=True):
        assert read.ids.tolist() == row.ids
        assert read.trained.tolist() == row.trained
        assert read.answer_start == row.answer_start
    assert store.where(1) == "a.jsonl line 2"
    assert Rows.whole(store, np.arange(3)).trained_counts.tolist() == [3, 1, 1]


@given(sizes, st.integers(2, 60), st.sampled_from([DROP, CUT_START, CUT_END]))
@settings(deadline=None)
def test_conversations_are_brought_to_any_length_and_what_is_lost_is_counted(folders, lengths, tokens, long_rows):
    store = store_of([chat_row(length) for length in lengths], next(folders))
    result = cut(store, tokens, long_rows)
    long = [length for length in lengths if length > tokens]
    assert result.rows.lengths.max(initial=0) <= tokens
    assert result.long.tolist() == [i for i, length in enumerate(lengths) if length > tokens]
    # A row is left out where the cut leaves nothing to learn: all of its answer, or all but a first token that nothing predicts.
    kept = tokens if long_rows != DROP else 0
    teaches = [length for length in long if long_rows == CUT_START or (long_rows == CUT_END and tokens > max(1, length // 2))]
    assert len(result.rows) == len(lengths) - len(long) + len(teaches)
    assert len(result.untrained) == (len(long) - len(teaches) if long_rows != DROP else 0)
    assert result.lost_tokens == sum(length - kept for length in long)
    for row, number in zip(result.rows, result.rows.row, strict=True):
        whole = chat_row(lengths[number])
        start = len(whole) - len(row) if long_rows == CUT_START else 0
        assert row.ids.tolist() == whole.ids[start : start + len(row)]
        assert row.trained.tolist() == whole.trained[start : start + len(row)]
        assert row.answer_start == max(0, whole.answer_start - start)
    unended = without_end(result.rows, result.long, [END])
    assert len(unended) == (len(teaches) if long_rows == CUT_END else 0)
    assert result.rows.trained_counts.tolist() == [row.trained_tokens for row in result.rows]


@given(st.integers(2, 90), st.integers(2, 30), st.data())
@settings(deadline=None)
def test_windows_train_every_token_of_a_text_once_with_its_context_before_it(folders, length, tokens, data):
    stride = data.draw(st.integers(1, tokens))
    text = Encoded(list(range(length)), [True] * length)
    rows = cut(store_of([text], next(folders), [TEXT]), tokens, stride=stride).rows
    trained = [int(token) for row in rows for token in row.ids[row.trained]]
    assert trained == list(range(length))
    assert all(2 <= len(row) <= tokens for row in rows)
    begins = [int(row.ids[0]) for row in rows]
    assert begins[:-1] == [number * stride for number in range(len(rows) - 1)]
    # The last one begins a token earlier where it would have nothing but that token.
    assert begins[-1] in ((len(rows) - 1) * stride, (len(rows) - 1) * stride - 1)
    assert all(row.ids.tolist() == list(range(begin, begin + len(row))) for row, begin in zip(rows, begins, strict=True))
    assert rows.trained_counts.tolist() == [row.trained_tokens for row in rows]


def ids_of(rows: Rows) -> set[tuple[int, ...]]:
    return {tuple(row.ids) for row in rows}


def test_held_out_rows_do_not_depend_on_the_order_and_none_is_trained(folders):
    rows = [chat_row(6, first) for first in range(10, 70)]
    one = hold_out(cut(store_of(rows, next(folders)), 100).rows, 9)
    other = hold_out(cut(store_of(rows[::-1], next(folders)), 100).rows, 9)
    assert [row.ids.tolist() for row in one.held] == [row.ids.tolist() for row in other.held]
    assert (len(one.held), len(one.train), len(other.train)) == (9, 51, 51)
    assert not ids_of(one.train) & ids_of(one.held)


def test_a_row_that_is_equal_to_a_held_out_one_is_not_trained(folders):
    rows = [chat_row(6, first) for first in range(10, 30)] * 2
    split = hold_out(cut(store_of(rows, next(folders)), 100).rows, 5)
    assert not ids_of(split.train) & ids_of(split.held)
    assert len(split.train) + len(split.held) + split.dropped == 40
    assert split.dropped >= 1


def test_what_became_of_one_conversation_is_held_out_together(folders):
    # A template that rewrites earlier turns makes two rows of each of these conversations.
    rows = [chat_row(6, first) for first in range(10, 210)]
    with writing_store(folder := next(folders)) as (writer, meta):
        for number, row in enumerate(rows):
            writer.add(row, CHAT, 0, number // 2)
        meta |= {"sources": [{"format": "messages"}], "files": [["a.jsonl", "line"]]}
    split = hold_out(cut(TokenStore(folder), 100).rows, 21)
    assert len(split.held) == 22
    numbers = split.held.store.number
    assert not set(numbers[split.held.row].tolist()) & set(numbers[split.train.row].tolist())


def test_no_token_of_a_held_out_window_is_read_in_training(folders):
    text = Encoded(list(range(3000)), [True] * 3000)
    split = hold_out(cut(store_of([text], next(folders), [TEXT]), 100, stride=50).rows, 6)
    held = {int(token) for row in split.held for token in row.ids}
    assert len(split.held) == 6
    assert not held & {int(token) for row in split.train for token in row.ids}
    assert len(split.train) + len(split.held) + split.dropped == 59
    assert split.dropped >= 6


@pytest.mark.parametrize("count", [0, 400, 1000])
def test_what_is_held_out_does_not_change_a_weights_share(folders, count):
    rows = [chat_row(6, first) for first in range(10, 2010)]
    split = hold_out(cut(store_of(rows, next(folders)), 100).rows, count)
    assert abs(len(weighted(split.train, [0.5])) / len(split.train) - 0.5) < 0.05


def test_weights_repeat_whole_sources_and_take_a_fixed_share(folders):
    rows = [chat_row(4, first) for first in range(10, 410)]
    kinds = [CHAT] * 200 + [TEXT] * 200
    chosen = weighted(cut(store_of(rows, next(folders), kinds), 100).rows, [2.0, 0.25])
    counts = np.bincount(chosen.row, minlength=400)
    assert (counts[:200] == 2).all()
    assert set(counts[200:]) == {0, 1}
    assert 30 < counts[200:].sum() < 70
    again = weighted(cut(store_of(rows, next(folders), kinds), 100).rows, [2.0, 0.25])
    assert (again.row == chosen.row).all()
