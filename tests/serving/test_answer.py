"""Which prompts are answered together: as many as their padded cache may hold, and all in the order they were given in."""

import random
from itertools import pairwise

from qlite.serving import answer
from qlite.serving.answer import Sampling, answer_all

SAMPLING = Sampling(max_tokens=10)


def batches_seen(monkeypatch, prompts: list[list[int]]) -> tuple[list[str], list[list[int]], list[int]]:
    """Return the answers (each prompt's length as text), the lengths of the prompts of each batch, and what was told."""
    batches, told = [], []

    def answer_batch(model, encoder, prompts, sampling):
        batches.append([len(ids) for ids in prompts])
        return [str(len(ids)) for ids in prompts]

    monkeypatch.setattr(answer, "answer_batch", answer_batch)
    return answer_all(None, None, prompts, SAMPLING, told.append), batches, told


def test_a_batch_holds_no_more_tokens_than_its_cache_may(monkeypatch):
    monkeypatch.setattr(answer, "TOKENS_AT_ONCE", 400)
    chance = random.Random(0)
    # Many short ones before long ones: the long ones must not ride on the short ones' room.
    prompts = [[7] * chance.choice([1, 2, 3, 90, 300, 900]) for _ in range(200)]
    answers, batches, told = batches_seen(monkeypatch, prompts)
    assert answers == [str(len(ids)) for ids in prompts]
    assert told[-1] == 200
    for lengths in batches:
        assert len(lengths) == 1 or len(lengths) * (max(lengths) + 10) <= 400
    # ... and none could have taken the next prompt as well.
    for lengths, after in pairwise(batches):
        assert (len(lengths) + 1) * (after[0] + 10) > 400


def test_without_prompts_there_are_no_answers(monkeypatch):
    assert batches_seen(monkeypatch, []) == ([], [], [])
