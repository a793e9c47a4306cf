"""What the tests of memory keys share: a tiny adapted model with the keys set, its gradient, and a watch over every tensor's life."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from qlite import offload
from qlite.methods.base import trainable_tensors
from qlite.methods.lora import LoRA
from qlite.model.head import hidden_states
from qlite.model.lowering import lower_memory
from qlite.recipe.schema import Memory
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
LAYERS = 4
# What a card can do with host memory: look at it, and copy it.
COPYING = {"aten::copy_", "aten::detach", "aten::empty_like", "aten::empty", "aten::clone"}


def adapt(model: PreTrainedModel, memory: Memory, **method) -> PreTrainedModel:
    """Return ``model`` in training mode, adapted, no B at zero, lowered as ``memory`` says."""
    torch.manual_seed(1)
    LoRA(rank=4, alpha=8.0, **method).attach(model)
    generator = torch.Generator().manual_seed(5)
    for p in trainable_tensors(model).values():
        p.data += torch.randn(p.shape, generator=generator) * 0.05
    lower_memory(model, memory, CPU)
    return model.train()


def lowered(
    storage: str = "4 bit", memory: Memory | None = None, sizes: dict | None = None, dtype: torch.dtype = torch.float32, **method
) -> PreTrainedModel:
    """Return a tiny Llama of ``LAYERS`` blocks in ``storage``, adapted and lowered."""
    model = tiny_llama(storage, dtype, **{"num_hidden_layers": LAYERS, **(sizes or {})})
    return adapt(model, memory or Memory(), **method)


def ids(rows: int = 2, tokens: int = 20) -> Tensor:
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(2))


def loss_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return a scalar that weighs every hidden state in its own way."""
    torch.manual_seed(7)
    states = hidden_states(model, tokens)
    return (states.float() * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum()


def gradient(model: PreTrainedModel, tokens: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, and each trained tensor's gradient."""
    for p in model.parameters():
        p.grad = None
    loss = loss_of(model, ids() if tokens is None else tokens)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainable_tensors(model).items()}


def distance(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the relative L2 distance of two gradients."""
    assert gradients.keys() == expected.keys()
    one, other = (torch.cat([each[name].flatten().double() for name in expected]) for each in (gradients, expected))
    return ((one - other).norm() / other.norm()).item()


def are_equal(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return gradients.keys() == expected.keys() and all(torch.equal(gradients[name], expected[name]) for name in expected)


def assert_same(model: PreTrainedModel, expected: PreTrainedModel, steps: int = 1) -> None:
    """Assert that ``model`` gives the loss and gradient of ``expected``, bit for bit, each time."""
    right, gradients = gradient(expected)
    for _ in range(steps):
        loss, found = gradient(model)
        assert torch.equal(loss, right)
        assert are_equal(found, gradients)


class Watch(TorchDispatchMode):
    """While it is entered: the storages made that live on the device, their peak, and what is computed on host memory."""

    def __init__(self, size: int = 0):
        """``size``: of which storages, by their bytes, ``most_of_size`` counts those alive at a time."""
        super().__init__()
        self.size, self.most_of_size, self.peak, self.largest = size, 0, 0, 0
        self.on_host: set[str] = set()
        self._alive: dict[int, weakref.ref] = {}

    @property
    def device_bytes(self) -> int:
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        return [storage.nbytes() for ref in self._alive.values() if (storage := ref()) is not None]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(leaf, Tensor) and offload.is_host(leaf) for leaf in tree_leaves((args, kwargs))):
            self.on_host.add(func._schema.name)
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given and not offload.is_host(leaf):
                storage = leaf.untyped_storage()
                key = storage._cdata
                self._alive[key] = weakref.ref(storage, lambda _, key=key: self._alive.pop(key, None))
        sizes = self._sizes()
        self.peak, self.largest = max(self.peak, sum(sizes)), max([self.largest, *sizes])
        self.most_of_size = max(self.most_of_size, sizes.count(self.size))
        return out
