"""Where every byte is: the life of each tensor's storage, followed from its allocation to its release, under one of a dozen terms.

The same ledger follows a real run and a traced one (fake tensors, which have shapes and lives but no bytes), so a plan and a
measurement can be compared term by term. What it counts is what torch's allocator on a card would count as allocated, but for
rounding and for what a kernel allocates inside; on a CPU the process holds more (libraries, file pages, the allocator's own).
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlite import offload
from qlite.memory import terms
from qlite.memory.terms import Terms

UNTOLD = ""


@dataclass(frozen=True)
class Peak:
    """The largest sum of living bytes at one place of a run: by term."""

    terms: Terms = field(default_factory=dict)
    where: str = ""
    host: int = 0
    """The most bytes that lay in host memory on purpose (offloaded) there; not part of ``terms``, and perhaps not at the same time."""

    @property
    def bytes(self) -> int:
        return sum(self.terms.values())

    def as_record(self) -> dict:
        """Return the peak for a file, in bytes."""
        return {"bytes": self.bytes, **vars(self)}


Moment = tuple[str, str]
"""A phase of a run ("evaluation") and a place in the model ("backward, last block")."""


class Ledger(TorchDispatchMode):
    """Follows storages while it is entered. ``adopt`` names those that last; what else is allocated gets its term by where the model is.

    What is still alive when a block's forward pass ends is kept for the backward pass, and is moved to that term.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moments: dict[Moment, Peak] = {}
        self.now: Terms = {}
        self._total = self._host = 0
        self._lives: dict[int, _Life] = {}
        self._fresh: set[int] = set()  # allocated since the last block's end
        self._phase = _Phase("", terms.WORKSPACE, terms.SAVED)
        self._term: str | None = None
        self._where = ""

    @property
    def bytes(self) -> int:
        """Bytes alive now, host copies left out."""
        return self._total

    @property
    def host_bytes(self) -> int:
        """Bytes of host copies alive now."""
        return self._host

    def adopt(self, tensors: Iterable[Tensor], term: str) -> None:
        """Put ``tensors``, known already or not, under ``term``."""
        for tensor in tensors:
            self._put(tensor.untyped_storage(), term)
        self._note_peak()

    def adopt_model(self, model: nn.Module) -> None:
        """Put all of ``model``'s tensors under the terms of their places."""
        for term, tensors in terms.of_model(model).items():
            self.adopt(tensors, term)

    @contextmanager
    def phase(self, name: str, default: str = terms.WORKSPACE, kept: str = terms.SAVED) -> Iterator[None]:
        """Note the peaks of what runs inside under ``name``.

        What it allocates outside of blocks and loss is ``default``, what a block leaves alive is ``kept``.
        """
        before = self._phase, self._term, self._where
        self._phase, self._term, self._where = _Phase(name, default, kept), None, ""
        self._note_peak()
        try:
            yield
        finally:
            self._phase, self._term, self._where = before

    def reading(self, where: str) -> None:
        """Say which part of a model is being loaded."""
        self._is_at(None, where)

    @contextmanager
    def following(self, model: nn.Module, blocks: list[nn.Module]) -> Iterator[None]:
        """Let hooks on ``model``'s ``blocks`` say where it is, until the context is left."""
        last = len(blocks) - 1
        self.adopt_model(model)  # streamed weights that came while nobody followed

        def leave(module: nn.Module, *_: object) -> None:
            if module is model:  # not a view of it that has its hooks, too: the head's, as which the loss runs it
                self._is_at(None, "")

        handles = [model.base_model.register_forward_pre_hook(lambda *_: self._is_at(terms.INSIDE, "embedding"))]
        handles.append(model.register_forward_hook(leave))
        for number, block in enumerate(blocks):
            name = name_of_block(number, len(blocks))
            handles.append(block.register_forward_pre_hook(self._entering(name)))
            handles.append(block.register_forward_hook(self._leaving(name, number == last)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._is_at(None, "")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._see(out, func, args)
        elif isinstance(out, tuple | list):
            for each in out:
                if isinstance(each, Tensor):
                    self._see(each, func, args)
        return out

    def _is_at(self, term: str | None, where: str) -> None:
        self._term, self._where = term, where

    def _entering(self, name: str) -> Callable:
        def hook(*_: object) -> None:
            if not _in_backward():
                self._keep_fresh()
                self._is_at(terms.INSIDE, f"forward, {name}")

        return hook

    def _leaving(self, name: str, is_last: bool) -> Callable:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            if _in_backward():
                return
            self._keep_fresh()
            if is_last:
                self._is_at(terms.LOSS, "head and loss")
            states = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
            if states is not None and states.requires_grad:
                states.register_hook(lambda _: self._is_at(terms.INSIDE, f"backward, {name}"))

        return hook

    def _see(self, tensor: Tensor, func: object, args: tuple) -> None:
        if tensor.device.type == "meta":  # a model's skeleton has no memory; a fake tensor says the device that it stands for
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._lives:
            self._put(storage, UNTOLD if offload.is_window(storage) else self._term_of(func, args))
            self._fresh.add(storage._cdata)
            self._note_peak()

    def _term_of(self, func: object, args: tuple) -> str:
        if offload.is_weights_copy():
            return terms.BASE
        return terms.DEQUANTISED if _is_dequantised(func, args) else self._term or self._phase.default

    def _put(self, storage: torch.UntypedStorage, term: str) -> None:
        key = storage._cdata
        life = self._lives.get(key)
        if life is None:
            ended = weakref.ref(storage, lambda _: self._end(key))
            self._lives[key] = life = _Life(storage.nbytes(), term, offload.is_host(storage), ended)
        else:
            self._count(life, -life.bytes)
            life.term, life.is_host = term, offload.is_host(storage)
            self._fresh.discard(key)
        self._count(life, life.bytes)

    def _end(self, key: int) -> None:
        life = self._lives.pop(key)
        self._fresh.discard(key)
        self._count(life, -life.bytes)

    def _count(self, life: "_Life", change: int) -> None:
        if life.term == UNTOLD:
            return
        if life.is_host:
            self._host += change
        else:
            self._total += change
            self.now[life.term] = self.now.get(life.term, 0) + change

    def _note_peak(self) -> None:
        moment = (self._phase.name, self._where)
        best = self.moments.get(moment)
        if best is None or self._total > best.bytes or self._host > best.host:
            told = {term: size for term, size in self.now.items() if size} if best is None or self._total > best.bytes else best.terms
            self.moments[moment] = Peak(told, self._where, max(self._host, best.host if best else 0))

    def _keep_fresh(self) -> None:
        """Move what the block or the embedding has left alive to what is kept for the backward pass."""
        for key in self._fresh:
            life = self._lives[key]
            if life.term not in (UNTOLD, terms.BASE):  # a streamed block's weights come while the block before it computes
                self._count(life, -life.bytes)
                life.term = self._phase.kept
                self._count(life, life.bytes)
        self._fresh.clear()


@dataclass
class _Life:
    bytes: int
    term: str
    is_host: bool
    ref: weakref.ref


@dataclass(frozen=True)
class _Phase:
    name: str
    default: str
    kept: str


def name_of_block(number: int, count: int) -> str:
    """Return block ``number`` of ``count`` in words, the same for all blocks that are neither first nor last."""
    return "first block" if number == 0 else "last block" if number == count - 1 else "a middle block"


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_dequantised(func: object, args: tuple) -> bool:
    """Return whether ``func`` makes a dense weight from a packed one: bitsandbytes' ops and ours, or int8 codes made floats."""
    name = str(func)
    if name.startswith(("bitsandbytes.dequantize", "qlite.dequantize")):
        return True
    return name.startswith("aten._to_copy") and isinstance(args[0], Tensor) and args[0].dtype == torch.int8
