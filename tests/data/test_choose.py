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
    assert int(result.rows.lengths.sum()) + result.lost_tokens == sum(lengths)
    assert len(result.rows) == len(lengths) - (len(long) if long_rows == DROP else 0)
    for row, number in zip(result.rows, result.rows.row, strict=True):
        whole = chat_row(lengths[number])
        start = len(whole) - len(row) if long_rows == CUT_START else 0
        assert row.ids.tolist() == whole.ids[start : start + len(row)]
        assert row.trained.tolist() == whole.trained[start : start + len(row)]
        assert row.answer_start == max(0, whole.answer_start - start)
    unended = without_end(result.rows, result.long, [END])
    assert len(unended) == (len(long) if long_rows == CUT_END else 0)
    assert result.rows.trained_counts.tolist() == [row.trained_tokens for row in result.rows]


@given(st.integers(2, 90), st.integers(2, 30), st.data())
@settings(deadline=None)
def test_windows_train_every_token_of_a_text_once_with_its_context_before_it(folders, length, tokens, data):
    stride = data.draw(st.integers(1, tokens))
    text = Encoded(list(range(length)), [True] * length)
    rows = cut(store_of([text], next(folders), [TEXT]), tokens, stride=stride).rows
    trained = [int(token) for row in rows for token in row.ids[row.trained]]
    # A last window of one token has nothing to predict it from: only without overlap can that be.
    lost = 1 if stride == tokens and length % tokens == 1 and length > tokens else 0
    assert trained == list(range(length - lost))
    assert all(len(row) <= tokens for row in rows)
    for number, row in enumerate(rows):
        assert row.ids.tolist() == list(range(number * stride, number * stride + len(row)))
    assert rows.trained_counts.tolist() == [row.trained_tokens for row in rows]


def test_held_out_rows_do_not_depend_on_the_order_and_none_is_trained(folders):
    rows = [chat_row(6, first) for first in range(10, 70)]
    kept, held, _ = hold_out(cut(store_of(rows, next(folders)), 100).rows, 9)
    again, held_again, _ = hold_out(cut(store_of(rows[::-1], next(folders)), 100).rows, 9)
    assert [row.ids.tolist() for row in held] == [row.ids.tolist() for row in held_again]
    assert len(kept) == len(again) == 51
    assert not {tuple(row.ids) for row in kept} & {tuple(row.ids) for row in held}


def test_a_row_that_is_equal_to_a_held_out_one_is_not_trained(folders):
    rows = [chat_row(6, first) for first in range(10, 30)] * 2
    kept, held, equal = hold_out(cut(store_of(rows, next(folders)), 100).rows, 5)
    assert not {tuple(row.ids) for row in kept} & {tuple(row.ids) for row in held}
    assert len(kept) + len(held) + equal == 40
    assert equal >= 1


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
