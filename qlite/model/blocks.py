"""A model's decoder blocks: what is checkpointed, streamed, tiled and counted one at a time."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the blocks by dotted name, in the order in which they run: the outermost modules that transformers can checkpoint."""
    found: dict[str, nn.Module] = {}
    inner: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inner:
            found[name] = module
            inner |= set(module.modules())
    return found
