"""Single rows of the token embedding and of the output head that are trained, all others frozen: PEFT's trainable tokens.

The rows are the tokens' own weights, not a difference to them. They lie under the names of PEFT's files; where head and embedding are
one tensor, so are their rows.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qlite.methods.base import AdaptedLinear, StandIn
from qlite.quant.dense import matrix_rows
from qlite.quant.embedding import embedding_shell


class TokenRows(nn.Module):
    """The trained rows [N, D] of N tokens."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.trainable_tokens_delta = nn.Parameter(rows)


class RowsEmbedding(StandIn, nn.Module):
    """A frozen embedding of any storage, some of whose rows are trained."""

    def __init__(self, base: nn.Module, ids: Tensor):
        """``ids`` [N]: the tokens, in ascending order."""
        super().__init__()
        self.base, self.shell = base, embedding_shell(base)
        self.num_embeddings, self.embedding_dim, self.padding_idx = base.num_embeddings, base.embedding_dim, base.padding_idx
        self.register_buffer("ids", ids, persistent=False)
        self.token_adapter = TokenRows(matrix_rows(base, ids))

    @property
    def weight(self) -> Tensor:
        """The frozen table: where it is, not what it is."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids [...] to rows [..., D], as the family's own embedding gives them."""
        places = torch.searchsorted(self.ids, ids).clamp_(max=len(self.ids) - 1)
        rows = self.token_adapter.trainable_tokens_delta
        trained = functional_call(self.shell, {"weight": rows}, (places,)) if self.shell else nn.functional.embedding(places, rows)
        return torch.where((self.ids[places] == ids).unsqueeze(-1), trained, self.base(ids))

    def merged_weight(self, dense: Tensor) -> Tensor:
        """Return the one table equal to this module, [V, D] float32, given the base's ``dense`` table (float32)."""
        return _with_rows(dense, self.ids, self.token_adapter)


class RowsLinear(AdaptedLinear):
    """A frozen output head of any storage, some of whose rows are trained."""

    def __init__(self, base: nn.Module, ids: Tensor, tied: TokenRows | None = None):
        """``tied``: the embedding's rows, where head and embedding are one tensor."""
        super().__init__(base)
        self.register_buffer("ids", ids, persistent=False)
        self.is_tied = tied is not None
        self.token_adapter = TokenRows(matrix_rows(base, ids)) if tied is None else tied

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states [..., D] to logits [..., V]."""
        bias = None if self.base.bias is None else self.base.bias[self.ids]
        # Written over the base's own logits: a second tensor of their size would be the largest of the pass.
        trained = nn.functional.linear(x, self.token_adapter.trainable_tokens_delta.to(x.dtype), bias)
        return self.base(x).index_copy_(-1, self.ids, trained)

    def merged_weight(self, dense: Tensor) -> Tensor:
        return _with_rows(dense, self.ids, self.token_adapter)


def train_rows(model: nn.Module, ids: dict[str, list[int]]) -> None:
    """Let the rows of ``ids`` be trained in each layer that names them: the embedding and the head, by dotted name.

    Where head and embedding are one tensor and the head is not named, its rows are the embedding's.
    """
    where = {name: torch.tensor(sorted(tokens), device=model.get_submodule(name).weight.device) for name, tokens in ids.items()}
    head_name, tied = head_tied_to(model), None
    for name, tokens in where.items():
        layer = model.get_submodule(name)
        is_head = layer is model.get_output_embeddings()
        stand_in = RowsLinear(layer, tokens) if is_head else RowsEmbedding(layer, tokens)
        if layer is model.get_input_embeddings() and head_name is not None and head_name not in ids:
            tied = RowsLinear(model.get_submodule(head_name), tokens, stand_in.token_adapter)
        _put(model, name, stand_in)
    if tied is not None:
        _put(model, head_name, tied)


def head_tied_to(model: nn.Module) -> str | None:
    """Return the dotted name of ``model``'s output head where it is the embedding's tensor, or None where it is not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weight = getattr(head, "weight", None)  # an adapted head has none of its own
    if weight is None or weight is not getattr(embedding, "weight", None):
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _with_rows(dense: Tensor, ids: Tensor, rows: TokenRows) -> Tensor:
    return dense.index_copy(0, ids.to(dense.device), rows.trainable_tokens_delta.to(dense))
