"""The block constants of a decoder block's 4-bit matrices, made by one call for all of them.

With double quantisation a matrix's constants are 8-bit codes themselves (Dettmers et al. 2023, arXiv:2305.14314, section 3), made
float32 before each use of the matrix: two kernels for a tensor of a 64th of its numbers, of which a card and its host know little but
the launch. The matrices of a block are used one after the other, so their codes lie one after the other here, and what is made of
them is kept until another block's are asked for: 4 bytes for 64 weights, of one block at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qlite.quant.linear import Packed4bit

SECOND_LEVEL_BLOCK = 256
"""Constants under one second-level constant (arXiv:2305.14314, section 3)."""


def less_offset(codes: Tensor, code: Tensor, scale: Tensor) -> Tensor:
    """Return the constants [N] float32 behind ``codes`` [N], each an index into ``code`` [256], less the offset that all have."""
    return torch.ops.bitsandbytes.dequantize_blockwise(codes, scale, code, SECOND_LEVEL_BLOCK, torch.float32)


class JointConstants:
    """The codes of several matrices in one tensor, each's from a multiple of 256 on, and the constants that are made of them."""

    def __init__(self, matrices: list["Packed4bit"]):
        self.code = matrices[0].absmax_code  # bitsandbytes has one table for all
        seconds = [matrix.absmax_scale.numel() for matrix in matrices]
        self.codes = matrices[0].absmax.new_zeros(sum(seconds) * SECOND_LEVEL_BLOCK)
        for matrix, codes in zip(matrices, self.codes.split([count * SECOND_LEVEL_BLOCK for count in seconds]), strict=True):
            codes[: matrix.absmax.numel()] = matrix.absmax
        self.scale = torch.cat([matrix.absmax_scale for matrix in matrices])
        offsets = [matrix.absmax_offset.expand(count) for matrix, count in zip(matrices, seconds, strict=True)]
        self.offset = torch.cat(offsets).unsqueeze(1)

    def write(self, into: Tensor) -> None:
        """Write the constants of all matrices to the start of ``into``, float32."""
        made = less_offset(self.codes, self.code, self.scale).view(-1, SECOND_LEVEL_BLOCK)
        torch.add(made, self.offset, out=into[: len(self.codes)].view(-1, SECOND_LEVEL_BLOCK))


class Latest:
    """What was made last, of whichever block asked, always in the same place: made anew for each, it would leave holes on a card.

    As all else in an adapted model it is of one pass at a time.
    """

    def __init__(self) -> None:
        self.values = torch.empty(0)
        self._joint: JointConstants | None = None

    def of(self, joint: JointConstants) -> Tensor:
        """Return the constants of ``joint``."""
        if self._joint is not joint:
            self._joint = None
            joint.write(self.values)
            self._joint = joint
        return self.values


@dataclass(frozen=True)
class Share:
    """One matrix's part of ``joint``."""

    joint: JointConstants
    latest: Latest
    codes: Tensor
    """Its own, a view."""
    place: slice
    version: int
    """Of the codes as they were joined."""

    @property
    def tensors(self) -> list[Tensor]:
        """What lasts of it beside the matrix's own tensors."""
        return [self.joint.offset, self.latest.values]

    def __deepcopy__(self, _memo: dict) -> None:
        """A copy of the matrix has none: its tensors count their versions anew."""

    def constants(self, codes: Tensor) -> Tensor | None:
        """Return the constants behind ``codes``, the matrix's now, [N] float32; None where they are no longer those that were joined."""
        # What was written over where it lies (ReLoRA's merges) may have another offset, too.
        is_same = codes is self.codes and codes._version == self.version
        return self.latest.of(self.joint)[self.place] if is_same else None


@torch.no_grad()
def join_constants(groups: Iterable[list["Packed4bit"]]) -> None:
    """Let the matrices of each of ``groups``, of one model, have their constants made together, where they are quantised and several.

    Bit for bit what each would make for itself. Their codes and scales are views from then on; a matrix that is given others goes without.
    """
    latest, most = Latest(), None
    for group in groups:
        nested = [matrix for matrix in group if matrix.storage.double_quant]
        if len(nested) < 2 or len({matrix.absmax.device for matrix in nested}) > 1:
            continue
        joint, first = JointConstants(nested), 0
        for matrix in nested:
            count, second = matrix.absmax.numel(), matrix.absmax_scale.numel()
            place = slice(first * SECOND_LEVEL_BLOCK, first * SECOND_LEVEL_BLOCK + count)
            matrix.absmax, matrix.absmax_scale = joint.codes[place], joint.scale[first : first + second]
            matrix.share_of_constants = Share(joint, latest, matrix.absmax, place, joint.codes._version)
            first += second
        most = joint if most is None or len(joint.codes) > len(most.codes) else most
    if most is not None:
        latest.values = most.scale.new_empty(len(most.codes))
