"""The terms under which memory is told: what lasts (weights, adapter, gradients, optimizer) and what comes and goes in a step."""

from torch import Tensor, nn

from qlite.offload import learned_buffers
from qlite.quant.linear import Packed4bit, QuantLinear

Terms = dict[str, int]
"""Bytes by term."""

BASE = "base weights"
CONSTANTS = "block constants"
VOCABULARY = "embedding and head"
REST = "norms and tables"
ADAPTER = "adapter"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
SAVED = "saved for backward"
INSIDE = "inside a block"
DEQUANTISED = "dequantised weight"
LOSS = "head and loss"
CACHE = "key-value cache"
WORKSPACE = "workspace"
ALL = (BASE, CONSTANTS, VOCABULARY, REST, ADAPTER, GRADIENTS, OPTIMIZER, SAVED, INSIDE, DEQUANTISED, LOSS, CACHE, WORKSPACE)
LASTING = ALL[: ALL.index(SAVED)]


def of_model(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return all tensors of ``model`` by term. A tensor that is embedding and head is told once."""
    outer = [module for module in (model.get_output_embeddings(), model.get_input_embeddings()) if module is not None]
    vocabulary = {inner for module in outer for inner in module.modules()}
    found: dict[str, list[Tensor]] = {}
    for module in model.modules():
        is_vocabulary = module in vocabulary
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            found.setdefault(_term(module, name, tensor, is_vocabulary), []).append(tensor)
        if isinstance(module, Packed4bit) and module.share_of_constants:
            found[CONSTANTS] += module.share_of_constants.tensors
    return found


def _term(module: nn.Module, name: str, tensor: Tensor, is_vocabulary: bool) -> str:
    if tensor.requires_grad or name in learned_buffers(module):
        return ADAPTER
    if is_vocabulary:
        return VOCABULARY
    if isinstance(module, QuantLinear):
        return BASE if name == "weight" else REST if name == "bias" else CONSTANTS
    return BASE if isinstance(module, nn.Linear) and name == "weight" else REST
