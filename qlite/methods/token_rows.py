"""Single rows of the token embedding and of the output head that are trained, all others frozen: PEFT's trainable tokens.

The rows are the tokens' own weights, not a difference to them. They lie under the names of PEFT's files; where head and embedding are
one tensor, so are their rows.
"""

from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AddedToken, PreTrainedTokenizerBase

from qlite.errors import RecipeError, shown
from qlite.methods.base import AdaptedLinear, StandIn, put_module
from qlite.quant.dense import matrix_rows, matrix_shape
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
        own = self.ids.to(ids.device)  # made beside the table, which may lie on the host
        places = torch.searchsorted(own, ids.contiguous()).clamp_(max=len(own) - 1)
        rows = self.token_adapter.trainable_tokens_delta
        trained = functional_call(self.shell, {"weight": rows}, (places,)) if self.shell else nn.functional.embedding(places, rows)
        return torch.where((own[places] == ids).unsqueeze(-1), trained, self.base(ids))

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


def token_ids(tokenizer: PreTrainedTokenizerBase | None, tokens: Sequence[str | int], new: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of ``tokens`` and of ``new``, which are added to ``tokenizer``; without one, as many ids as there are.

    Raises:
        RecipeError: a token is none of the tokenizer's, a new one is, or one is named twice.
    """
    if tokenizer is None:
        return tuple(range(len(tokens) + len(new)))
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in tokens if isinstance(token, str) and token not in vocabulary]
    problems = [f'method.trained_tokens: the tokenizer has no token "{shown(each)}"; {_instead(each, vocabulary)}' for each in unknown]
    known = [token for token in new if token in vocabulary]
    ids = [vocabulary.get(token, -1) if isinstance(token, str) else token for token in tokens]
    problems += [f"method.trained_tokens: token {each} is named twice; leave it out once" for each in _twice(ids) if each >= 0]
    problems += [f'method.new_tokens: "{shown(each)}" stands twice; leave it out once' for each in _twice(new)]
    problems += [f'method.new_tokens: "{shown(each)}" is a token already; name it in method.trained_tokens' for each in known]
    if problems:
        raise RecipeError(problems)
    # Not special: what a tokenizer calls special is left out of answers.
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    return (*ids, *tokenizer.convert_tokens_to_ids(list(new)))


def rows_to_train(model: nn.Module, ids: Sequence[int], taken: set[str]) -> dict[str, list[int]]:
    """Return what ``train_rows`` is to train for the tokens ``ids``: rows of the embedding, and of a head that is another tensor.

    ``taken``: layers that are trained otherwise.

    Raises:
        RecipeError: there is no such row, or a layer is trained otherwise.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = [names[module] for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    count = matrix_shape(model.get_input_embeddings())[0]
    problems = [
        f"method.trained_tokens, method.new_tokens: {layer} is trained otherwise, too (method.targets or method.modules_to_save); "
        "leave it out of one"
        for layer in layers
        if layer in taken
    ]
    if beyond := [each for each in ids if each >= count]:
        problems.append(
            f"method.trained_tokens, method.new_tokens: token {beyond[0]} has no row, for the embedding has {count} rows and they all have "
            "tokens; name a token that the base does not use, a reserved one, in method.trained_tokens"
        )
    if problems:
        raise RecipeError(problems)
    return {layer: list(ids) for layer in layers if layer != head_tied_to(model)}


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
        put_module(model, name, stand_in)
    if tied is not None:
        put_module(model, head_name, tied)


def head_tied_to(model: nn.Module) -> str | None:
    """Return the dotted name of ``model``'s output head where it is the embedding's tensor, or None where it is not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weight = getattr(head, "weight", None)  # an adapted head has none of its own
    if weight is None or weight is not getattr(embedding, "weight", None):
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _with_rows(dense: Tensor, ids: Tensor, rows: TokenRows) -> Tensor:
    return dense.index_copy(0, ids.to(dense.device), rows.trainable_tokens_delta.to(dense))


def _twice(values: Sequence) -> list:
    return [value for number, value in enumerate(values) if value in values[:number]]


def _instead(token: str, vocabulary: dict[str, int]) -> str:
    close = get_close_matches(token, vocabulary, n=1)
    meant = f'did you mean "{shown(close[0])}"? ' if close else ""
    return f"{meant}A text that is to become one stands in method.new_tokens"
