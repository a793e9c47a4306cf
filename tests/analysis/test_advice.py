"""The advice on ranks: for planted updates it is the one that is known to be right, and it says where it cannot know."""

import torch

from qlite.analysis.advice import LIMITS, Need, advise
from qlite.analysis.findings import study
from qlite.analysis.page import page
from qlite.methods.low_rank import LowRank
from tests.analysis.test_figures import planted


def advice_for(updates: dict[str, LowRank]) -> list[str]:
    return study("a", updates, lambda *_: None).advice()


def test_an_update_of_rank_5_is_advised_rank_8():
    lines = advice_for({f"model.layers.{block}.self_attn.q_proj": planted([1.0] * 5, block, extra=11) for block in range(3)})
    assert lines[0].startswith("90% of the energy lies in rank 5 or less: method.rank = 8. Keep the scaling, alpha / rank")
    assert lines[1:] == [LIMITS]


def test_a_linear_that_needs_more_is_named_with_its_own_rank():
    updates = {f"model.layers.{block}.self_attn.{leaf}": planted([1.0] * rank, block, extra=20 - rank)
               for block in range(2) for leaf, rank in (("q_proj", 12), ("k_proj", 5), ("v_proj", 5))}  # fmt: skip
    (line, _) = advice_for(updates)
    assert "of k_proj, v_proj lies in rank 5 or less: method.rank = 8, and for the others: method.rank_per_target = {q_proj = 16}" in line


def test_the_worst_block_decides_and_not_the_mean():
    updates = {f"layers.{block}.q_proj": planted([1.0] * rank, block, extra=16 - rank) for block, rank in enumerate((1, 1, 1, 7))}
    assert "rank 7 or less: method.rank = 8" in advice_for(updates)[0]


def test_a_rank_that_was_used_to_its_end_is_said_to_tell_nothing():
    (line, limits) = advice_for({"layers.0.q_proj": planted([1.0] * 8)})
    assert line.startswith("q_proj (8 of 8): 90% of the energy needs nearly all of the rank")
    assert line.endswith("only tried: method.rank = 16")
    assert limits == LIMITS


def test_linears_at_their_end_keep_their_rank_beside_others():
    (line, end, _) = advise([Need("q_proj", 16, 3, 4), Need("down_proj", 16, 15, 4)])
    assert "of q_proj lies in rank 3 or less: method.rank = 4, and for the others: method.rank_per_target = {down_proj = 16}" in line
    assert end.startswith("down_proj (15 of 16)")


def test_no_more_than_the_trained_rank_is_advised():
    assert [Need("q", 12, 9, 1).advised, Need("q", 12, 5, 1).advised, Need("q", 1, 1, 1).advised] == [12, 8, 1]


def test_kept_energy_of_all_linears_is_that_of_their_sum():
    updates = {"layers.0.q_proj": planted([3.0, 4.0]), "layers.0.k_proj": planted([12.0], seed=1)}
    found = study("a", updates, lambda *_: None)
    torch.testing.assert_close(torch.tensor(found.kept()), torch.tensor([160 / 169, 1.0]))
    assert [round(each.share, 6) for each in found.linears] == [round(25 / 169, 6), round(144 / 169, 6)]


def test_a_kind_of_linear_that_was_not_changed_loses_nothing_at_any_rank():
    updates = {"layers.0.q_proj": planted([3.0, 4.0]), "layers.0.v_proj": planted([], seed=1, extra=3)}
    found = study("a", updates, lambda *_: None)
    assert found.kept("v_proj") == [1.0, 1.0, 1.0]
    assert "v_proj" in page(found)
    nothing = study("a", {"layers.0.v_proj": planted([], extra=3)}, lambda *_: None)
    assert "v_proj" in page(nothing)


def test_ranks_of_their_own_keep_their_scaling_by_an_alpha_of_their_own():
    (line, _) = advise([Need("q_proj", 16, 7, 4), Need("v_proj", 16, 2, 4)])
    assert "method.rank = 8, and for the others: method.rank_per_target = {v_proj = 2}" in line
    assert line.endswith(
        "set method.alpha along with it, and method.alpha_per_target for those with a rank of their own: "
        "alpha = old alpha x new rank / old rank, with rslora by the root of the ranks"
    )


def test_linears_at_their_end_that_have_the_advised_rank_are_not_listed():
    (line, _, _) = advise([Need("q_proj", 32, 16, 4), Need("down_proj", 16, 15, 4)])
    assert "of q_proj lies in rank 16 or less: method.rank = 16" in line
    assert "per_target" not in line
