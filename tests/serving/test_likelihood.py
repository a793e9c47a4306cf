"""Likelihoods of continuations, against plain softmaxes over all logits; multiple choice, against lm-evaluation-harness's rule."""

import pytest
import torch
from torch import nn

from qlite.errors import OutOfMemory
from qlite.serving import likelihood
from qlite.serving.likelihood import Continuation, accuracy, log_likelihoods
from tests.tiny import random_rows, tiny_llama


def some_continuations(count: int = 9, seed: int = 0) -> list[Continuation]:
    rows = [row.ids for row in random_rows(count, lengths=(3, 14), seed=seed)]
    return [Continuation(list(ids[: 1 + index % 2]), list(ids[1 + index % 2 :])) for index, ids in enumerate(rows)]


def plainly(model: nn.Module, continuation: Continuation) -> float:
    """Return the same from all logits of one row at a time, in float64."""
    ids = torch.tensor([continuation.prompt + continuation.ids])
    with torch.no_grad():
        logs = model(ids).logits[0].double().log_softmax(dim=-1)
    start = len(continuation.prompt)
    return sum(logs[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1]))


def test_each_sum_is_that_of_a_plain_softmax_over_all_logits():
    model, continuations = tiny_llama(), some_continuations()
    sums = log_likelihoods(model, continuations, pad_id=0)
    assert len(sums) == 9
    assert sums == pytest.approx([plainly(model, continuation) for continuation in continuations], rel=1e-5)
    assert all(value < 0 for value in sums)


@pytest.mark.parametrize("tokens_at_once", [1, 20, 10_000])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_any_batch_size_and_any_chunk_give_the_same_sums(monkeypatch, tokens_at_once, chunk):
    model, continuations = tiny_llama(), some_continuations()
    whole = log_likelihoods(model, continuations, pad_id=0)
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", tokens_at_once)
    assert log_likelihoods(model, continuations, pad_id=3, chunk=chunk) == pytest.approx(whole, rel=1e-5)


def test_where_memory_runs_out_fewer_texts_are_read_together_and_the_sums_are_the_same(monkeypatch):
    model, continuations = tiny_llama(), some_continuations()
    whole, sizes, real = log_likelihoods(model, continuations, pad_id=0), [], likelihood.hidden_states

    def small(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        sizes.append(ids.numel())
        if ids.numel() > limit:
            raise MemoryError
        return real(model, ids)

    monkeypatch.setattr(likelihood, "hidden_states", small)
    limit = 30
    assert log_likelihoods(model, continuations, pad_id=0) == pytest.approx(whole, rel=1e-5)
    assert max(sizes) > limit
    assert max(sizes[3:]) <= limit
    limit = 5
    with pytest.raises(OutOfMemory, match="a single text of 1[0-9] tokens"):
        log_likelihoods(model, continuations, pad_id=0)


def test_the_chances_of_all_tokens_that_may_follow_sum_to_one():
    model = tiny_llama()
    every = [Continuation([5, 9, 2], [token]) for token in range(64)]
    chances = torch.tensor(log_likelihoods(model, every, pad_id=0)).exp()
    assert chances.sum().item() == pytest.approx(1, abs=1e-5)


def test_a_continuation_is_as_likely_as_its_parts_one_after_the_other():
    model = tiny_llama()
    whole, first, rest = log_likelihoods(
        model, [Continuation([5, 9], [2, 7, 1]), Continuation([5, 9], [2]), Continuation([5, 9, 2], [7, 1])], pad_id=0
    )
    assert whole == pytest.approx(first + rest, rel=1e-5)


def test_logits_are_made_only_where_a_continuation_is_predicted_and_a_chunk_at_a_time():
    model, continuations, seen = tiny_llama(), some_continuations(), []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    log_likelihoods(model, continuations, pad_id=0, chunk=4)
    hook.remove()
    assert max(seen) == 4
    assert sum(seen) == sum(len(continuation.ids) for continuation in continuations)


def test_what_is_read_alike_is_read_once():
    model, seen = tiny_llama(), []
    hook = model.model.register_forward_pre_hook(lambda _, __, names: seen.append(names["input_ids"].shape), with_kwargs=True)
    letters = [Continuation([5, 9, 2], [token]) for token in (10, 11, 12, 13)]
    sums = log_likelihoods(model, letters, pad_id=0)
    hook.remove()
    assert seen == [(1, 3)]
    assert sums == pytest.approx([plainly(model, letter) for letter in letters], rel=1e-5)


def test_progress_ends_at_the_number_of_continuations(monkeypatch):
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", 20)
    told = []
    log_likelihoods(tiny_llama(), some_continuations(), pad_id=0, told=told.append)
    assert told == sorted(told)
    assert told[-1] == 9
    assert len(told) > 3


def test_the_likeliest_choice_is_found_by_sum_and_by_character():
    # Question 1: sums say "no"; per character -3 / 2 = -1.5 for "no" is less than -4 / 8 = -0.5 for "possibly".
    # Question 2: "b" by both. Question 3: two alike, the first counts.
    likelihoods = [[-3.0, -4.0], [-9.0, -1.0], [-2.0, -2.0]]
    choices = [("no", "possibly"), ("a", "b"), ("x", "y")]
    found = accuracy(likelihoods, choices, right=[1, 1, 1])
    assert found.by_sum == pytest.approx(1 / 3)
    assert found.by_character == pytest.approx(2 / 3)
    assert accuracy(likelihoods[2:], choices[2:], right=[0]).by_sum == 1
