"""Tensors that lie in host memory until the device needs them, and the lanes that carry them beside the computation.

The CUDA side of offloading is here alone: pinned memory, the second stream, the events. On a CPU the same logic runs with real
copies: a copy marked as host memory stands for the host's, an unmarked one for what a card would hold.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

_MARK, _FILE_MARK = "lies_on_host", "is_on_file"


class _Allocating(threading.local):
    """What this thread is allocating right now: who follows allocations sees a tensor before it can be marked."""

    on_host = False
    """Host memory."""
    on_file = False
    """A window on a file."""
    weights = False
    """Copies of frozen weights."""


_allocating = _Allocating()


def is_host(tensor: Tensor | torch.UntypedStorage) -> bool:
    """Return whether ``tensor`` lies in host memory on purpose, although a device computes with it."""
    return _allocating.on_host or getattr(_storage(tensor), _MARK, False)


def mark_host(tensor: Tensor) -> Tensor:
    """Mark ``tensor``'s storage, for its whole life, as host memory; return ``tensor``."""
    setattr(_storage(tensor), _MARK, True)
    return tensor


def window(make: Callable[[], Tensor]) -> Tensor:
    """Return the tensor that ``make`` opens on a file, marked: its pages are no memory that a run needs."""
    with _allocates("on_file"):
        tensor = make()
    setattr(_storage(tensor), _FILE_MARK, True)
    return tensor


def is_window(storage: torch.UntypedStorage) -> bool:
    """Return whether ``storage`` is a window on a file."""
    return _allocating.on_file or getattr(storage, _FILE_MARK, False)


def is_weights_copy() -> bool:
    """Return whether what is allocated right now is to hold a copy of frozen weights."""
    return _allocating.weights


def on_host() -> AbstractContextManager:
    """Enter what computes in host memory: what it allocates lies there, though it may not be marked."""
    return _allocates("on_host")


@contextmanager
def _allocates(what: str) -> Iterator[None]:
    before = getattr(_allocating, what)
    setattr(_allocating, what, True)
    try:
        yield
    finally:
        setattr(_allocating, what, before)


def host_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy of ``tensor`` in host memory, pinned if ``device`` is a card; ``tensor`` itself if it lies there already."""
    return tensor if is_host(tensor) else _empty_on_host(tensor, device).copy_(tensor.detach())


@torch.no_grad()
def keep_on_host(module: nn.Module, device: torch.device) -> None:
    """Move ``module``'s frozen tensors, its children's too, to host memory that ``device`` reads fast. What names share stays shared."""
    moved: dict[Tensor, Tensor] = {}
    for owner, name, tensor in frozen_tensors(module):
        if tensor.device.type != "meta" and not is_host(tensor):
            if tensor not in moved:
                copy = host_copy(tensor, device)
                moved[tensor] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
            put(owner, name, moved[tensor])


def frozen_tensors(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Return (owner, name, tensor) for all that is the base's in ``module`` and its children: what is neither trained nor learned."""
    owners = list(module.modules())
    own = [(owner, *pair) for owner in owners for pair in (*owner._parameters.items(), *owner._buffers.items())]
    return [
        (owner, name, tensor)
        for owner, name, tensor in own
        if tensor is not None and not tensor.requires_grad and name not in learned_buffers(owner)
    ]


def learned_buffers(module: nn.Module) -> tuple[str, ...]:
    """Return the names of those of ``module``'s buffers that a method writes to: copies of them would not do."""
    return (*getattr(type(module), "saved_buffers", ()), *getattr(type(module), "resumed_buffers", ()))


def put(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """Let ``owner``'s frozen parameter or buffer ``name`` be ``tensor``."""
    is_parameter = name in owner._parameters and not isinstance(tensor, nn.Parameter)
    setattr(owner, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def to_device(rows: Tensor, device: torch.device) -> Tensor:
    """Return a copy on ``device`` of ``rows``, which were computed on the host."""
    return rows.to(device) if device.type == "cuda" else mark_host(rows).clone()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor``, a small one that the host has made, on ``device``.

    The host does not wait: in a plain copy to a card it would, for all that the card has still to do.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    pinned = torch.empty_like(tensor, pin_memory=True).copy_(tensor)  # torch holds its memory until the copy is done
    return pinned.to(device, non_blocking=True)


class Lane:
    """A queue of copies between host memory and one device, beside the computation: the computation waits only for what it uses."""

    def __init__(self, device: torch.device, weights: bool = False):
        self.device, self.carries_weights = device, weights
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send_to_host(self, tensors: list[Tensor]) -> "Copies":
        """Begin to copy ``tensors``, which lie on the device, into host memory."""
        return self._send([_empty_on_host(tensor, self.device) for tensor in tensors], tensors)

    def send_to_device(self, tensors: list[Tensor]) -> "Copies":
        """Begin to copy ``tensors``, which lie in host memory, onto the device."""
        with _allocates("weights") if self.carries_weights else nullcontext():
            targets = [torch.empty_like(tensor, device=self.device, requires_grad=False) for tensor in tensors]
        return self._send(targets, tensors)

    @torch.no_grad()
    def _send(self, targets: list[Tensor], sources: list[Tensor]) -> "Copies":
        sources = [tensor.detach() for tensor in sources]
        if self._stream is None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            return Copies(targets, sources, None)
        # What the computation has queued so far may still write the sources, or read what lay in the targets' memory before.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            return Copies(targets, sources, self._stream.record_event())


class Copies:
    """Copies under way. Both ends are held until ``arrived`` has let the computation wait for them.

    So neither end's memory is handed out again too early, and it is free the moment it is let go (``record_stream`` would hold it
    back until later copies are done, too).
    """

    def __init__(self, targets: list[Tensor], sources: list[Tensor], event: "torch.cuda.Event | None"):
        self._targets, self._sources, self._event = targets, sources, event

    def arrived(self) -> list[Tensor]:
        """Return the copies, which the computation may use from here on; the sources are let go. The CPU does not wait."""
        self._wait()
        self._sources = []
        return self._targets

    def _wait(self) -> None:
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
            self._event = None

    def __del__(self) -> None:
        self._wait()

    @property
    def _device(self) -> torch.device:
        return next(end.device for end in (*self._targets, *self._sources) if end.device.type == "cuda")


def _empty_on_host(tensor: Tensor, device: torch.device) -> Tensor:
    with on_host():
        return mark_host(torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda", requires_grad=False))


def _storage(tensor: Tensor | torch.UntypedStorage) -> torch.UntypedStorage:
    return tensor.untyped_storage() if isinstance(tensor, Tensor) else tensor
