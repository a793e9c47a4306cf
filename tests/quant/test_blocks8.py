"""Activations in 8 bit: near where they should be, small, and not upset by outliers, zeros or odd sizes."""

import pytest
import torch

from qlite.quant.blocks8 import to_blocks8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 128), (5, 7, 9), (1,), (3, 64)])
def test_each_value_is_within_half_a_step_of_its_block(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = to_blocks8(x).dense()
    assert back.shape == x.shape
    assert back.dtype == dtype
    step = x.abs().max().item() / 127
    rounding = 0 if dtype is torch.float32 else x.abs().max().item() / 256
    assert (back.double() - x.double()).abs().max() <= step / 2 * 1.0001 + rounding


def test_half_a_step_is_of_the_own_block_only():
    x = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(0))
    x[..., 5] = 1000.0  # an outlier channel
    error = (to_blocks8(x).dense() - x).abs()
    assert error[..., 64:].max() <= x[..., 64:].abs().max() / 254 * 1.0001
    assert error[..., :64].max() > 0.1
    assert (error[..., 5] == 0).all()


def test_zeros_stay_zeros_and_the_largest_stays_itself():
    x = torch.zeros(2, 64)
    x[1, 3], x[1, 4] = -3.0, 1e-3
    back = to_blocks8(x).dense()
    assert torch.equal(back[0], x[0])
    assert back[1, 3] == -3.0


def test_very_small_values_are_kept_in_proportion():
    x = torch.linspace(-1e-30, 1e-30, 64).view(1, 64)
    assert (to_blocks8(x).dense() - x).abs().max() <= 1e-30 / 254 * 1.01


def test_a_value_takes_a_byte_and_a_sixteenth():
    packed = to_blocks8(torch.randn(4, 16, 64))
    assert packed.codes.nbytes + packed.scales.nbytes == 4 * 16 * 64 * 17 // 16


def test_what_is_not_finite_does_not_become_a_number():
    x = torch.ones(2, 64)
    x[0, 0], x[1, 0] = float("inf"), float("nan")
    assert not to_blocks8(x).dense().isfinite().all(dim=1).any()
