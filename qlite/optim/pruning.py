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
    """Set the ``share`` of least magnitude of each moment's numbers ``part`` to zero, in place; 1: all of them.

    ``state``: of one flat parameter; what is no moment (the count of steps) stays. Of 8-bit state no other number changes.
    """
    for name, eight_bit in MOMENTS.items():
        moment = state.get(name)
        if not isinstance(moment, Tensor):
            continue
        own = moment.view(-1)[part]
        if own.dtype == torch.uint8:
            code, sizes = (state[key] for key in eight_bit)
            blocks = torch.arange(part.start, part.stop, device=own.device) // BLOCK
            own[_least(code[own.int()] * sizes[blocks], share)] = int(code.abs().argmin())
        else:
            own[_least(own, share)] = 0


def _least(values: Tensor, share: float) -> Tensor:
    """Return where the ``share`` of ``values`` [N] of least magnitude are, [N] bool; of equal ones all or none."""
    count = round(share * len(values))
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    magnitudes = values.abs()
    return magnitudes <= magnitudes.kthvalue(count).values
