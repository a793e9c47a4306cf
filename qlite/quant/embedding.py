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
        self.family: nn.Embedding | None = None
        if type(embedding).forward is not nn.Embedding.forward:
            self.family = embedding
            # A row's place is not its token's, so the mark of one token would be wrong; it only ever stops a gradient.
            embedding.padding_idx = None
            # Nothing of its own is kept; a buffer, because a model's first parameter says where the model is.
            empty = embedding.weight.new_empty(0, self.embedding_dim, dtype=dtype)
            del embedding.weight
            embedding.register_buffer("weight", empty, persistent=False)

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


def matrix_of(module: nn.Module) -> Packed | None:
    """Return the packed matrix of a linear or an embedding, or None if it has none."""
    return module.table if isinstance(module, QuantEmbedding) else module if isinstance(module, Packed) else None


@torch.no_grad()
def dense_embedding(embedding: QuantEmbedding) -> nn.Embedding:
    """Return a dense copy of ``embedding``, of its family's own class, in the dtype that it computes in, on its device."""
    count, size, mark = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
    if embedding.family is None:
        dense = nn.Embedding(count, size, mark, device="meta")
    else:
        dense = copy.deepcopy(embedding.family)
        del dense.weight
        dense.padding_idx = mark
    dense.weight = nn.Parameter(embedding.table.dense(embedding.table.compute_dtype))
    return dense
