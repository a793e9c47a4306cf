"""Spectra, similarity and amplification: equal to the paper's definitions over dense matrices, and to answers that are known beforehand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qlite.analysis.amplification import amplification, strongest
from qlite.analysis.similarity import Overlap, by_chance, random_directions, similarities
from qlite.analysis.spectrum import Spectrum, input_directions
from qlite.methods.low_rank import LowRank, resize
from tests.adapters import random_update
from tests.reference import subspaces

OUT, IN = 24, 40


def planted(sizes: list[float], seed: int = 0, extra: int = 0) -> LowRank:
    """Return an update [24, 40] whose singular values are ``sizes``, and ``extra`` zeros, in random directions."""
    left, right = random_directions(OUT, len(sizes) + extra, seed), random_directions(IN, len(sizes) + extra, seed + 100)
    sigma = torch.tensor([*sizes, *[0.0] * extra], dtype=torch.float64)
    # Mixed by a random matrix that cancels, as training would: neither factor shows the directions.
    mixed = torch.randn(len(sigma), len(sigma), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return LowRank(torch.linalg.solve(mixed, right.T), left * sigma @ mixed / 1.5, 1.5)


def dense(update: LowRank) -> np.ndarray:
    return (update.scaling * update.B.double() @ update.A.double()).numpy()


# Spectra


def test_a_planted_spectrum_is_found_with_its_directions():
    update = planted([8.0, 3.0, 1.0], extra=2)
    found = Spectrum.of(update)
    assert found.sigma.tolist() == pytest.approx([8, 3, 1, 0, 0], abs=1e-9)
    assert torch.allclose(found.left * found.sigma @ found.right.T, torch.from_numpy(dense(update)))
    assert float(similarities(found.left[:, :3], random_directions(OUT, 5)[:, :3])[-1, -1]) == pytest.approx(1)


def test_kept_energy_is_what_the_nearest_smaller_update_keeps():
    update = random_update(6)
    found = Spectrum.of(update)
    assert found.kept == pytest.approx([resize(update, rank).kept for rank in range(1, 7)])
    assert found.kept[-1] == pytest.approx(1)


def test_effective_rank_is_that_of_the_dense_matrix_and_has_its_known_ends():
    update = random_update(6)
    assert Spectrum.of(update).effective_rank == pytest.approx(subspaces.effective_rank(dense(update)))
    assert Spectrum.of(planted([2.0] * 5)).effective_rank == pytest.approx(5)
    assert Spectrum.of(planted([2.0], extra=4)).effective_rank == pytest.approx(1)


def test_a_rank_larger_than_the_linear_has_no_more_directions_than_it():
    found = Spectrum.of(random_update(30))
    assert found.sigma.shape == (OUT,)
    assert found.norm == pytest.approx(float(np.linalg.norm(dense(random_update(30)))))


def test_an_update_that_is_zero_has_rank_0_and_lacks_nothing():
    found = Spectrum.of(LowRank(torch.randn(3, IN), torch.zeros(OUT, 3), 1.0))
    assert (found.norm, found.effective_rank, found.rank_for(0.9)) == (0.0, 0.0, 1)


# Similarity


def test_similarity_is_the_papers_for_every_i_and_j():
    one, other = random_update(5, seed=1), random_update(8, seed=2)
    found = similarities(input_directions(one), input_directions(other))
    assert found.shape == (5, 8)
    for i in range(1, 6):
        for j in range(1, 9):
            assert float(found[i - 1, j - 1]) == pytest.approx(subspaces.phi(one.A.double().numpy(), other.A.double().numpy(), i, j))


def test_similarity_is_one_less_the_projection_metric_squared_a_direction():
    one, other = random_directions(IN, 4, 1), random_directions(IN, 7, 2)
    distance = subspaces.projection_distance(one.numpy(), other.numpy())
    assert float(similarities(one, other)[-1, -1]) == pytest.approx(1 - distance**2 / 4)


def test_an_adapter_is_1_to_itself_and_orthogonal_ones_are_0():
    own = input_directions(random_update(6))
    assert torch.allclose(similarities(own, own).diagonal(), torch.ones(6, dtype=own.dtype))
    both = random_directions(IN, 12)
    assert float(similarities(both[:, :6], both[:, 6:]).max()) < 1e-20


def test_the_shared_half_of_two_adapters_is_found():
    both = random_directions(IN, 9)
    found = similarities(both[:, :6], both[:, [0, 1, 2, 6, 7, 8]])
    assert float(found[2, 2]) == pytest.approx(1)
    assert float(found[5, 5]) == pytest.approx(0.5)
    assert float(found[0, 5]) == pytest.approx(1)  # the smaller lies in the larger


def test_chance_gives_what_is_said_of_it():
    found = [float(similarities(random_directions(200, 10, seed), random_directions(200, 20, seed + 1000))[-1, -1]) for seed in range(30)]
    assert sum(found) / 30 == pytest.approx(by_chance(10, 20, 200), rel=0.05)
    assert by_chance(10, 20, 200) == 0.1


def test_overlap_of_an_update_with_itself_its_negative_and_a_stranger():
    update = planted([4.0, 2.0, 1.0, 0.5])
    same = Overlap.of(update, update)
    assert (same.cosine, same.inputs, same.outputs) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    opposite = LowRank(update.A, -update.B, update.scaling)
    assert Overlap.of(update, opposite).cosine == pytest.approx(-1)
    directions = torch.linalg.qr(torch.cat([random_directions(IN, 4, 100), random_directions(IN, 4, 9)], dim=1)).Q
    stranger = LowRank(directions[:, 4:].T, random_directions(OUT, 4, 7), 1.0)
    found = Overlap.of(update, stranger)
    assert (found.cosine, found.inputs) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))


def test_cosine_is_that_of_the_dense_updates():
    one, other = random_update(5, seed=1), random_update(3, seed=2)
    a, b = dense(one), dense(other)
    assert Overlap.of(one, other).cosine == pytest.approx(float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)))


# Amplification


def weight_of(sizes: list[float], seed: int = 3) -> Tensor:
    return torch.from_numpy(dense(planted(sizes, seed))).float()


def test_amplification_is_the_papers():
    update, weight = random_update(4), torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5))
    found = amplification(weight, Spectrum.of(update))
    expected = subspaces.amplification(dense(update), weight.double().numpy(), 4)
    assert (found.update, found.within, found.own) == pytest.approx(expected, rel=1e-4)
    assert found.factor == pytest.approx(expected[0] / expected[1], rel=1e-4)


def test_an_update_along_the_weights_own_strongest_directions_has_its_ratio_as_factor():
    weight = weight_of([9.0, 6.0, 5.0, 1.0])
    U, sigma, V = torch.linalg.svd(weight.double())
    update = LowRank(V[:2], U[:, :2] * sigma[:2] * 0.5, 1.0)  # half of W itself, in its two strongest directions
    found = amplification(weight, Spectrum.of(update))
    assert found.factor == pytest.approx(0.5, rel=1e-5)
    assert found.factor == pytest.approx(found.own_factor, rel=1e-5)
    assert found.random_factor > 2 * found.factor


def test_an_update_where_the_weight_does_nothing_amplifies_without_bound():
    weight = weight_of([9.0, 6.0])
    U, _, V = torch.linalg.svd(weight.double())
    found = amplification(weight, Spectrum.of(LowRank(V[10:12], U[:, 10:12], 1.0)))
    assert found.factor > 1e4


def test_the_strongest_directions_are_as_good_as_exact_on_the_hardest_weight():
    weight = torch.randn(300, 500, generator=torch.Generator().manual_seed(1))
    for count in (1, 4, 16, 64):
        exact = torch.linalg.svdvals(weight.double())[:count]
        found = strongest(weight, count)
        assert 0.99 < float(found.norm() / exact.norm()) <= 1 + 1e-6
