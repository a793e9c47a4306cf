"""Adapters of random values for the tests, as an adapter's folder would hold them."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from qlite.formats.foreign import ForeignAdapter, read_foreign_adapter
from qlite.formats.peft import write_adapter
from qlite.methods.base import trainable_tensors
from qlite.methods.lora import LoRA
from qlite.methods.low_rank import LowRank


def randomise(model: nn.Module, seed: int, size: float = 0.2) -> None:
    """Draw every trainable tensor anew: A and B of ``size``, lengths of rows between 0.5 and 1.5 times what they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in trainable_tensors(model).items():
            if "magnitude" in name:
                p.mul_(0.5 + torch.rand(p.shape, generator=generator))
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * size)


def put_on(model: nn.Module, method: LoRA, seed: int) -> ForeignAdapter:
    """Attach ``method`` to ``model`` with random values, and return them."""
    method.attach(model)
    randomise(model, seed)
    with TemporaryDirectory() as folder:
        write_adapter(Path(folder), model, method, "base")
        return read_foreign_adapter(Path(folder))


def random_update(rank: int, out: int = 24, columns: int = 40, seed: int = 0, scaling: float = 1.5) -> LowRank:
    """Return an update of random factors."""
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, columns, generator=generator), torch.randn(out, rank, generator=generator), scaling)
