"""The NF4 format restated in plain torch, from Dettmers et al. 2023 (arXiv:2305.14314), section 3 and appendix E."""

import torch
from torch import Tensor

# Appendix E of the paper, to the digits printed there.
LEVELS = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def nf4_round_trip(weight: Tensor, block_size: int = 64) -> Tensor:
    """Return ``weight`` as NF4 without double quantisation gives it back: each block scaled to its largest magnitude."""
    blocks = weight.float().reshape(-1, block_size)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    codes = (blocks / absmax).unsqueeze(-1).sub(LEVELS).abs().argmin(dim=-1)
    return (LEVELS[codes] * absmax).reshape(weight.shape)
