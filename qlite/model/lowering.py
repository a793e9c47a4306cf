"""What the recipe's [memory] table asks of the model: keep less on the device, at the price of copies or of computing again."""

from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from qlite.model.blocks import decoder_blocks
from qlite.model.checkpointing import SavedInputs, checkpoint_blocks
from qlite.model.fusing import make_again
from qlite.model.host_embedding import keep_embedding_on_host
from qlite.model.streaming import stream_blocks
from qlite.model.tiling import tile_mlps
from qlite.offload import learned_buffers
from qlite.quant.constants import join_constants
from qlite.quant.linear import Packed4bit


class MemoryKeys(Protocol):
    """The keys of [memory] that change the model."""

    checkpointing: str
    saved_inputs: SavedInputs
    mlp_chunk: int
    embedding: str
    base: str


def lower_memory(model: PreTrainedModel, memory: MemoryKeys, device: torch.device) -> None:
    """Let ``model``, adapted already, train and answer on ``device`` as ``memory`` says, before its first pass.

    Raises:
        ModelError: the model has no part that a key is for.
    """
    # What a method has made lies beside a base weight, which may lie on the host already.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name in learned_buffers(module):
            setattr(module, name, module.get_buffer(name).to(device))
    if memory.embedding == "host":
        keep_embedding_on_host(model, device)
    if memory.checkpointing == "elementwise":
        make_again(model)
    if memory.mlp_chunk:
        tile_mlps(model, memory.mlp_chunk)
    if memory.checkpointing not in ("none", "elementwise"):  # "auto", where no plan was made to choose by, is the least
        checkpoint_blocks(model, memory.saved_inputs, device, keep_attention=memory.checkpointing == "attention")
    if memory.base == "host":
        stream_blocks(model, device)
    else:
        blocks = decoder_blocks(model).values()
        join_constants([module for module in block.modules() if isinstance(module, Packed4bit)] for block in blocks)
    if "host" in (memory.embedding, memory.base):
        _say_device(model, device)


def modules_on_host(model: PreTrainedModel, memory: MemoryKeys) -> set[nn.Module]:
    """Return the modules whose frozen tensors ``memory`` wants in host memory.

    Whoever fills an empty ``model`` may hand each to ``keep_on_host`` as soon as it is stored: so the device never holds them all.
    """
    roots = [model.get_input_embeddings()] if memory.embedding == "host" else []
    roots += decoder_blocks(model).values() if memory.base == "host" else []
    return {module for root in roots for module in root.modules()}


def _say_device(model: PreTrainedModel, device: torch.device) -> None:
    """Let ``model.device`` be the ``device`` that it computes on: transformers looks where the first weight lies, and generates there."""
    family = type(model)
    model.__class__ = type(family.__name__, (family,), {"device": device, "__module__": family.__module__})
