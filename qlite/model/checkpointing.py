"""Activation checkpointing: keep each block's input, and compute the block again when its gradient is due.

Of a step's memory that grows with layers times tokens, the blocks' inputs are then all that is left. They can lie in host memory
or in 8 bit until they are needed.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from traceback import walk_tb
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qlite.errors import ModelError
from qlite.model.blocks import decoder_blocks
from qlite.model.documents import DOCUMENTS
from qlite.model.kept_attention import attention_kept
from qlite.offload import Lane
from qlite.quant.blocks8 import Blocks8, to_blocks8

SavedInputs = Literal["device", "host", "8bit"]


class Kept(Protocol):
    """A block's input, put away."""

    def dense(self) -> Tensor:
        """Return it on the device, in its own dtype."""


def checkpoint_blocks(
    model: PreTrainedModel, saved_inputs: SavedInputs = "device", device: torch.device | None = None, keep_attention: bool = False
) -> None:
    """Switch per-block checkpointing on (Chen et al. 2016, arXiv:1604.06174); it acts in training mode only.

    Non-reentrant: inputs need no gradient of their own, and random numbers (dropout) are drawn again alike. ``saved_inputs`` says
    where the inputs lie between the passes: on ``device``, where the model computes (default: its first weight's), as they are or in 8 bit,
    or in host memory. With ``keep_attention`` a block keeps what its attention gave, too, and does not compute it again.

    Raises:
        ModelError: ``keep_attention``, and the model does not compute its attention here.
    """
    options = {"use_reentrant": False}
    if keep_attention:
        _require_own_attention(model)
        options["context_fn"] = attention_kept
    model.activation_checkpointing_enable(options)
    # transformers lets the embedding's output require a gradient, which reentrant checkpointing would need: it would be computed,
    # stored as .grad, and keep that output alive through the whole step.
    model.disable_input_require_grads()
    keep = None
    if saved_inputs != "device":
        keep = to_blocks8 if saved_inputs == "8bit" else HostInputs(device or model.device).keep
    run = _Checkpointed(keep, options)
    for block in decoder_blocks(model).values():
        block._gradient_checkpointing_func = run


def _require_own_attention(model: PreTrainedModel) -> None:
    if model.config._attn_implementation != DOCUMENTS:
        raise ModelError(
            f'memory.checkpointing = "attention": it is known for base.attention = "auto" alone, and not for every family; this '
            f'"{model.config.model_type}" computes "{model.config._attn_implementation}" attention: set it to "block"'
        )


class _Checkpointed:
    """Runs a block checkpointed, its input put away by ``keep`` meanwhile, if there is one."""

    def __init__(self, keep: Callable[[Tensor], Kept] | None, options: dict):
        self.keep, self.options = keep, options

    def __call__(self, block: Callable, *inputs: object) -> object:
        """Return ``block(*inputs)``. Hidden states come first; what follows (masks, tables) is shared by all blocks and stays as it is."""
        with self._putting_away() if self.keep else nullcontext():
            try:
                return checkpoint(block, *inputs, **self.options)
            except BaseException as error:
                _let_go(error)
                raise

    def _putting_away(self) -> saved_tensors_hooks:
        is_first = True

        def pack(tensor: Tensor) -> Tensor | Kept:
            # In the order of the arguments; torch 2.11 saves an empty tensor before them. No reference to the input is kept here: the
            # graph holds this function, so it would hold the input, too.
            nonlocal is_first
            if not is_first or not tensor.numel():
                return tensor
            is_first = False
            return self.keep(tensor)

        return saved_tensors_hooks(pack, _unpack)


def _let_go(error: BaseException) -> None:
    """End what torch began around a block that raised ``error``.

    Before torch 2.13 it ends with the error: until then all that any block saves is lost, that of a step made again included.
    """
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__ and "gen" in frame.f_locals:
            frame.f_locals["gen"].close()


def _unpack(kept: Tensor | Kept) -> Tensor:
    return kept.dense() if isinstance(kept, Blocks8 | _HostInput) else kept


class HostInputs:
    """Keeps blocks' inputs in host memory: carried there while the block computes, and back while the block after it is computed again."""

    def __init__(self, device: torch.device):
        # Two lanes: a card has an engine for either direction.
        self._outward, self._inward = Lane(device), Lane(device)
        self._last: Callable[[], _HostInput | None] = lambda: None

    def keep(self, states: Tensor) -> "_HostInput":
        """Begin to carry ``states`` to the host. Those kept before are off the device by now."""
        before = self._last()
        if before is not None:
            before.leave_device()
        kept = _HostInput(states.detach(), self._outward, self._inward, before)
        self._last = weakref.ref(kept)
        return kept


class _HostInput:
    def __init__(self, states: Tensor, outward: Lane, inward: Lane, before: "_HostInput | None"):
        self._leaving = outward.send_to_host([states])
        self._inward, self._arriving = inward, None
        # The last block's input never leaves: it is the first that the backward pass asks for, at once.
        self._on_device: Tensor | None = states
        self._before = weakref.ref(before) if before is not None else lambda: None

    def leave_device(self) -> None:
        """Let go of what lies on the device; the computation waits for the copy, which had a block's time."""
        (self._host,) = self._leaving.arrived()
        self._on_device = None

    def fetch(self) -> None:
        """Begin to carry it back, unless it is on its way or here."""
        if self._on_device is None and self._arriving is None:
            self._arriving = self._inward.send_to_device([self._host])

    def dense(self) -> Tensor:
        """Return it on the device, and begin to fetch the one that is needed next: that of the block before."""
        self.fetch()
        states = self._on_device if self._arriving is None else self._arriving.arrived()[0]
        self._arriving = None
        before = self._before()
        if before is not None:
            before.fetch()
        return states
