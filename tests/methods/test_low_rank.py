"""Sums and smaller ranks of updates against the dense matrices that they stand for."""

import pytest
import torch

from qlite.methods.low_rank import LowRank, resize, weighted_sum
from tests.adapters import random_update


def test_a_weighted_sum_is_that_of_the_updates_and_not_of_their_factors():
    one, two = random_update(4, seed=0), random_update(4, seed=1, scaling=0.25)
    total = weighted_sum([(0.7, one), (-0.3, two)])
    assert total.rank == 8
    torch.testing.assert_close(total.dense(), 0.7 * one.dense() - 0.3 * two.dense())
    linear = LowRank(0.7 * one.A - 0.3 * two.A, one.B + two.B, 1.0).dense()  # what adding factors makes of it
    assert (linear - total.dense()).norm() > 0.5 * total.dense().norm()


def test_the_ranks_of_a_sum_may_differ():
    parts = [(2.0, random_update(1, seed=0)), (1.0, random_update(7, seed=1)), (-1.0, random_update(3, seed=2))]
    total = weighted_sum(parts)
    assert total.rank == 11
    torch.testing.assert_close(total.dense(), sum(weight * part.dense() for weight, part in parts))


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_smaller_rank_is_the_nearest_one_and_its_errors_are_what_the_dropped_singular_values_say(rank):
    update = random_update(8)
    found = resize(update, rank)
    dense = update.dense().double()
    U, sigma, V = torch.linalg.svd(dense)
    nearest = (U[:, :rank] * sigma[:rank]) @ V[:rank]
    assert found.update.rank == rank
    torch.testing.assert_close(found.update.dense().double(), nearest, atol=1e-4, rtol=1e-5)
    lost = found.update.A.double(), found.update.B.double()
    difference = dense - lost[1] @ lost[0]
    assert found.error == pytest.approx(float(torch.linalg.matrix_norm(difference)), rel=1e-5)
    assert found.largest_dropped == pytest.approx(float(torch.linalg.matrix_norm(difference, ord=2)), rel=1e-5)
    assert found.error == pytest.approx(float(sigma[rank:].square().sum().sqrt()), rel=1e-5)
    assert found.norm == pytest.approx(float(dense.norm()), rel=1e-6)
    assert found.kept == pytest.approx(1 - (found.error / found.norm) ** 2, rel=1e-12)


def test_no_other_update_of_that_rank_is_nearer():
    update, generator = random_update(8), torch.Generator().manual_seed(0)
    found, dense = resize(update, 3), update.dense()
    for _ in range(20):
        A = found.update.A + 0.01 * torch.randn(found.update.A.shape, generator=generator)
        B = found.update.B + 0.01 * torch.randn(found.update.B.shape, generator=generator)
        assert (dense - B @ A).norm() > found.error


def test_a_rank_that_an_update_does_not_use_is_cut_without_loss():
    one = random_update(3)
    twice = weighted_sum([(1.0, one), (1.0, one)])  # rank 6 in factors, 3 in truth
    found = resize(twice, 3)
    torch.testing.assert_close(found.update.dense(), 2 * one.dense(), atol=1e-4, rtol=1e-5)
    assert found.error < 1e-6 * found.norm
    assert found.kept == 1.0


def test_more_rank_than_there_is_changes_nothing_and_is_not_made_up():
    update = random_update(4)
    found = resize(update, 100)
    assert (found.update.rank, found.kept, found.error, found.largest_dropped) == (4, 1.0, 0.0, 0.0)
    torch.testing.assert_close(found.update.dense(), update.dense(), atol=1e-4, rtol=1e-5)


def test_both_factors_of_a_resized_update_are_of_one_size():
    update = resize(random_update(8), 4).update
    torch.testing.assert_close(update.A.square().sum(dim=1), update.B.square().sum(dim=0), atol=1e-4, rtol=1e-4)


def test_an_update_that_is_zero_is_resized_to_zero():
    update = random_update(4)
    found = resize(LowRank(update.A, torch.zeros_like(update.B), 1.0), 2)
    assert (found.kept, found.error, found.norm) == (1.0, 0.0, 0.0)
    assert not found.update.dense().any()
