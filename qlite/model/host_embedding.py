"""The input embedding in host memory: tokens are looked up there, and only their rows go to the device.

A vocabulary of 128k or more tokens takes up to 2 GiB at 16 bit, of which a step reads a few thousand rows.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlite.errors import ModelError
from qlite.offload import keep_on_host, on_host, to_device


def keep_embedding_on_host(model: PreTrainedModel, device: torch.device) -> None:
    """Move ``model``'s input embedding to host memory; what it gives goes to ``device``.

    It works with an embedding of any storage: the module's own code runs, on the host. The ids are brought there first, which waits
    for the device once a pass.

    Raises:
        ModelError: the output head is the same tensor, which the device needs; or the embedding is trained.
    """
    embedding = model.get_input_embeddings()
    if any(p.requires_grad for p in embedding.parameters(recurse=False)):
        raise ModelError(
            'memory.embedding = "host": the embedding is trained, and what is trained lies on the device; set memory.embedding = "device"'
        )
    embedding = getattr(embedding, "base", embedding)  # single rows that are trained stay on the device
    inner = set(embedding.modules())
    others = [module for module in model.modules() if module not in inner]
    if _storages([embedding]) & {storage for module in others for storage in _storages([module], recurse=False)}:
        raise ModelError(
            f'memory.embedding = "host": this "{model.config.model_type}" has one tensor for embedding and output head '
            '(tie_word_embeddings), which the head needs on the device; set memory.embedding = "device"'
        )
    keep_on_host(embedding, device)
    embedding.forward = _OnHost(embedding.forward, device)


def _storages(modules: list[nn.Module], recurse: bool = True) -> set[torch.UntypedStorage]:
    tensors = (t for module in modules for t in (*module.parameters(recurse), *module.buffers(recurse)))
    return {t.untyped_storage() for t in tensors if t.numel()}


class _OnHost:
    """Stands as an embedding's ``forward``."""

    def __init__(self, look_up, device: torch.device):
        self.look_up, self.device = look_up, device

    def __call__(self, ids: Tensor) -> Tensor:
        """Map ids [...], anywhere, to rows [..., D] on the device."""
        with on_host():
            rows = self.look_up(ids.cpu())
        return to_device(rows, self.device)
