"""Optimizer state of one parameter with its smallest numbers set to zero, in whatever form the library keeps it.

ReLoRA (Lialin et al. 2023, arXiv:2307.05695, section 3) prunes the moments by magnitude at each restart, so that old directions do not lead
the new factors where the old ones went.
"""

import torch
from torch import Tensor

MOMENTS = {"state1": ("qmap1", "absmax1"), "state2": ("qmap2", "absmax2"), "exp_avg": None, "exp_avg_sq": None}
"""What bitsandbytes' and torch's optimizers call their averages, and for those in 8 bit the code's values and the blocks' sizes."""
BLOCK = 256
"""Numbers of 8-bit state that share a size: bitsandbytes 0.50, optim/optimizer.py, Optimizer2State.init_state."""


@torch.no_grad()
def prune_moments(state: dict[str, object], part: slice, share: float) -> None:
    """Set the moments of those ``share`` of the numbers ``part`` whose first moment is smallest to zero, in place; 1: of all of them.

    Both moments of a number are dropped or neither. The authors' code prunes each by itself: a first moment that is left without its
    second is then divided by Adam's epsilon alone, and where the gradient is zero, as A's is while B is, the step is that of a million.

    ``state``: of one flat parameter; what is no moment (the count of steps) stays. Of 8-bit state no other number changes.
    """
    dropped = None
    for name, eight_bit in MOMENTS.items():
        moment = state.get(name)
        if not isinstance(moment, Tensor):
            continue
        own, zero = moment.view(-1)[part], 0
        is_packed = own.dtype == torch.uint8
        if dropped is None:
            dropped = _least(_unpacked(state, own, eight_bit, part) if is_packed else own, share)
        if is_packed:
            zero = int(state[eight_bit[0]].abs().argmin())
        own[dropped] = zero


def _unpacked(state: dict[str, object], codes: Tensor, names: tuple[str, str], part: slice) -> Tensor:
    """Return what the 8-bit ``codes`` of the numbers ``part`` stand for, [N] float32."""
    values, sizes = (state[name] for name in names)
    return values[codes.int()] * sizes[torch.arange(part.start, part.stop, device=codes.device) // BLOCK]


def _least(values: Tensor, share: float) -> Tensor:
    """Return where the ``share`` of ``values`` [N] of least magnitude are, [N] bool; of equal ones all or none."""
    count = round(share * len(values))
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    magnitudes = values.abs()
    return magnitudes <= magnitudes.kthvalue(count).values
