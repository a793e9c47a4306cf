"""A frozen embedding whose table is packed: only the rows that are asked for are ever dense."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qlite.quant.linear import Packed, Storage


class QuantEmbedding(nn.Module):
    """Token ids to rows of a packed table, as the embedding that it stands for gives them.

    A family's own class of embedding (Gemma's, which scales the rows) goes on running its own code: on a table of no more
    than the rows asked for, with ids that count these.
    """

    def __init__(self, embedding: nn.Embedding, storage: Storage, dtype: torch.dtype):
        """Make an empty one in place of ``embedding``, on its device; ``store`` fills it. ``storage`` has 4 or 8 bits."""
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
        self.table: Packed = storage.make_table(self.num_embeddings, self.embedding_dim, dtype, embedding.weight.device)
        self.family = embedding_shell(embedding)
        if self.family is not None:
            self.family.weight = self.family.weight.to(dtype)

    @property
    def weight(self) -> Tensor:
        """The packed table: where it is, not what it is."""
        return self.table.weight

    def store(self, weight: Tensor, device: torch.device | str | None = None) -> None:
        """Quantise ``weight`` [num_embeddings, embedding_dim], any float dtype, on ``device`` (default: where it lies)."""
        self.table.store(weight, device)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids [...] to rows [..., embedding_dim] in the compute dtype."""
        rows = self.table.rows(ids.reshape(-1))
        if self.family is None:
            return rows.view(*ids.shape, self.embedding_dim)
        places = torch.arange(len(rows), device=rows.device).view(ids.shape)
        return functional_call(self.family, {"weight": rows}, (places,))


def embedding_shell(embedding: nn.Module) -> nn.Embedding | None:
    """Return ``embedding`` without its table, to run its family's own code on given rows; None where that only looks them up."""
    if isinstance(embedding, QuantEmbedding):
        return embedding.family
    if type(embedding).forward is nn.Embedding.forward:
        return None
    shell = copy.copy(embedding)
    # A row's place is not its token's, so the mark of one token would be wrong; it only ever stops a gradient.
    shell.padding_idx = None
    # Nothing of its own is kept; a buffer, because a model's first parameter says where the model is.
    shell._parameters, shell._buffers = {}, dict(embedding._buffers)
    shell._non_persistent_buffers_set = set(embedding._non_persistent_buffers_set)
    shell.register_buffer("weight", embedding.weight.detach().new_empty(0, embedding.embedding_dim), persistent=False)
    return shell


def is_embedding(module: nn.Module | None) -> bool:
    """Return whether ``module`` is a token embedding of any storage."""
    return isinstance(module, nn.Embedding | QuantEmbedding)


def matrix_of(module: nn.Module) -> Packed | None:
    """Return the packed matrix of a linear or an embedding, or None if it has none."""
    return module.table if isinstance(module, QuantEmbedding) else module if isinstance(module, Packed) else None
