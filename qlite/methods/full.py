"""Full fine-tuning: every weight of the model is trained. What the other methods are measured against.

There is no frozen base then, and no adapter beside it: the "adapter" that a run writes is the whole model, and so is what each checkpoint
holds beside the optimizer's state. A weight takes 2 bytes in bfloat16, 2 more for its exact float32 master, 4 for the sum of its
gradients, and what the optimizer keeps: 8 bytes, or 2 in 8 bit.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from qlite.methods.base import Method, train_itself

# The decoder's blocks are numbered: "model.layers.3.", "transformer.h.3.".
BLOCK = re.compile(r"^(?:[^.]+\.)*?\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """All weights of the model, none of them frozen."""

    name: ClassVar[str] = "full"
    trains_base: ClassVar[bool] = True

    def attach(self, model: nn.Module) -> None:
        train_itself(model, self.name)

    def options_of(self, name: str, tensor: nn.Parameter) -> dict[str, object]:
        return {"block": block_of(name)}


def block_of(name: str) -> str:
    """Return the decoder block of the tensor ``name``, or "": of the groups that an optimizer has, one at a time takes float32 masters."""
    found = BLOCK.match(name)
    return found[0] if found else ""
