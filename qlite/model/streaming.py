"""Base-layer streaming: the blocks' frozen weights live in host memory and are on the device only while their block computes.

So a model can be larger than the card. A block's weights cross the bus twice a micro-batch (for the forward pass, and for the
recomputation with the backward pass), while the block before them computes; those of at most two blocks are on the device at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from qlite.errors import ModelError
from qlite.model.blocks import decoder_blocks
from qlite.offload import Copies, Lane, frozen_tensors, keep_on_host, put


def stream_blocks(model: PreTrainedModel, device: torch.device) -> None:
    """Move the frozen tensors of ``model``'s blocks to host memory, and bring each block's to ``device`` when its turn comes.

    Trained tensors stay. Needs per-block checkpointing in training: a block's products may then read its weights in both passes, and
    what autograd saves of a 16-bit weight is gone when the block's backward pass is.

    Raises:
        ModelError: nothing in the blocks is frozen.
    """
    blocks = list(decoder_blocks(model).values())
    if not any(tensor.dim() > 1 for block in blocks for _, _, tensor in frozen_tensors(block)):
        raise ModelError(
            'memory.base = "host": the blocks\' weights are trained, and what is trained lies on the device; set it to "device"'
        )
    stream = Stream(blocks, device)
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(_before_forward(stream, number))
        block.register_forward_hook(_before_backward(stream, number))


class Stream:
    """The frozen tensors of ``blocks``: in host memory, and those of at most two blocks on ``device``, too."""

    def __init__(self, blocks: list[nn.Module], device: torch.device):
        for block in blocks:
            keep_on_host(block, device)
        lane = Lane(device, weights=True)
        self._weights = [_Weights(block, lane) for block in blocks]

    def __len__(self) -> int:
        return len(self._weights)

    def bring(self, number: int, following: int) -> None:
        """Put block ``number``'s tensors in place on the device and begin to carry those of ``following`` there, if there is one."""
        wanted = {number, following}
        for other, weights in enumerate(self._weights):
            if other not in wanted:
                weights.drop()
        self._weights[number].fetch()
        self._weights[number].put_in_place()
        if 0 <= following < len(self):
            self._weights[following].fetch()


class _Weights:
    """One block's frozen tensors."""

    def __init__(self, block: nn.Module, lane: Lane):
        self._places = frozen_tensors(block)
        self._lane = lane
        self._copies: Copies | None = None
        self._are_in_place = False

    def fetch(self) -> None:
        if self._copies is None:
            self._copies = self._lane.send_to_device([tensor for _, _, tensor in self._places])

    def put_in_place(self) -> None:
        if not self._are_in_place:
            for (owner, name, _), copy in zip(self._places, self._copies.arrived(), strict=True):
                put(owner, name, copy)
            self._are_in_place = True

    def drop(self) -> None:
        if self._are_in_place:
            for owner, name, tensor in self._places:
                put(owner, name, tensor)
        self._copies, self._are_in_place = None, False


def _before_forward(stream: Stream, number: int) -> Callable:
    def hook(_block: nn.Module, _args: object) -> None:
        # After the last block the backward pass begins with the last, or, where there is none, the next token with the first.
        following = number + 1 if torch.is_grad_enabled() else (number + 1) % len(stream)
        stream.bring(number, following)

    return hook


def _before_backward(stream: Stream, number: int) -> Callable:
    """Return a hook on a block's output. Its gradient is known: the backward pass is through with the block after, and enters this one.

    Not in the recomputation, which may come too late: a frozen product saves nothing, so its backward pass, first of all in a block
    that ends with one, asks for no saved tensor.
    """

    def hook(_block: nn.Module, _args: object, output: object) -> None:
        states = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if states.requires_grad:
            states.register_hook(lambda _: stream.bring(number, number - 1))

    return hook
