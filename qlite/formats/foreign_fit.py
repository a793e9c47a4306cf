"""An adapter of another program on a model: held against it tensor by tensor, put on, and refused where it changes nothing."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlite.errors import AdapterError, shown, some_of
from qlite.formats.foreign import ForeignAdapter, Pair
from qlite.formats.peft import CONFIG, SHOWN_NAME, full_name
from qlite.methods.base import put_module
from qlite.methods.ia3 import ScaledLinear
from qlite.methods.lora import DoRALinear, LoRALinear, join_siblings
from qlite.methods.token_rows import head_tied_to, train_rows
from qlite.methods.whole import Whole, train_whole
from qlite.model.folder import folder_tokenizer
from qlite.model.source import ModelFiles
from qlite.offload import put
from qlite.quant.dense import dense_matrix, matrix_shape
from qlite.quant.embedding import is_embedding, matrix_of
from qlite.quant.linear import compute_dtype, is_linear

MOST_PROBLEMS = 5
# bfloat16 has 8 digits: a length that was only rounded to it is off by no more.
ROUNDED = 2.0**-8


def put_foreign_adapter(foreign: ForeignAdapter, model: PreTrainedModel, origin: Path) -> None:
    """Put ``foreign`` on ``model``, whose layers it replaces in part; its tensors keep their digits. ``origin`` is only named in messages.

    Biases are written into the base itself, and an embedding's low-rank update is added to a dense copy of it.

    Raises:
        AdapterError: it does not fit ``model``, all of it in one message; or it changes nothing.
    """
    problems = sorted(_misfits(foreign, model))
    if problems:
        raise AdapterError(f"{origin}: the adapter does not fit this base: {some_of(problems, MOST_PROBLEMS)}")
    changes = _put_whole(foreign, model)
    for layer, pair in foreign.embeddings.items():
        changes |= _put_on_embedding(model, layer, pair)
    for layer, pair in foreign.linears.items():
        changes |= _put_on_linear(model, layer, pair)
    for layer, factors in foreign.factors.items():
        changes |= _put_factors(model, layer, factors)
    join_siblings(model)
    changes |= _put_rows(foreign, model)
    if not changes:
        own = "*.ia3_l is 1" if foreign.factors else f"{foreign.zero_part} is zero"
        others = ", every saved tensor is the base's" if foreign.whole or foreign.rows else ""
        raise AdapterError(f"{origin}: every {own}{others}, so the adapter changes nothing of its base; was it ever trained?")


def writes_over_the_base(foreign: ForeignAdapter, model: PreTrainedModel) -> bool:
    """Return whether ``foreign``, once put on ``model``, has written over tensors of the base's: biases and norms have no stand-in."""
    matrices = {(layer, "weight") for layer in foreign.whole if is_linear(own := model.get_submodule(layer)) or is_embedding(own)}
    saved = {(layer, name) for layer, tensors in foreign.whole.items() for name in tensors}
    return not saved <= matrices or any(pair.bias is not None for pair in foreign.linears.values())


def adapter_tokenizer(folder: Path, model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that lies in the adapter's ``folder``, as trainers leave it there, or None where there is none.

    Raises:
        ModelError: it cannot be read.
        AdapterError: it has more tokens than ``model``, with the adapter on, has rows.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    tokenizer, rows = folder_tokenizer(ModelFiles(folder, None, str(folder))), model.get_input_embeddings().num_embeddings
    if (most := max(tokenizer.get_vocab().values())) >= rows:
        raise AdapterError(
            f"{folder}: its tokenizer has a token of id {most}, and the embedding with the adapter on it {rows} rows: the adapter lacks "
            "the new ones; take the tokenizer's files away to merge it with the base's"
        )
    return tokenizer


# Does it fit?


def _misfits(foreign: ForeignAdapter, model: PreTrainedModel) -> Iterator[str]:
    modules = dict(model.named_modules())
    for layer, pair in foreign.linears.items():
        if is_linear(module := modules.get(layer)):
            shape = (_rows_after(foreign, layer, module), matrix_shape(module)[1])
            yield from _pair_misfits(layer, pair, shape, module.bias is not None)
        else:
            yield f"it has no linear layer {shown(layer, SHOWN_NAME)}"
    for layer, factors in foreign.factors.items():
        if not is_linear(module := modules.get(layer)):
            yield f"it has no linear layer {shown(layer, SHOWN_NAME)}"
        elif tuple(factors.shape) not in ((rows := matrix_shape(module)[0], 1), (1, columns := matrix_shape(module)[1])):
            yield f"{full_name(layer, 'ia3_l')} is {list(factors.shape)}, needed is {[rows, 1]} or {[1, columns]}"
    for layer, pair in foreign.embeddings.items():
        if is_embedding(module := modules.get(layer)):
            rows, width = _rows_after(foreign, layer, module), module.embedding_dim
            expected = {"lora_embedding_A": (pair.A, (len(pair.A), rows)), "lora_embedding_B": (pair.B, (width, len(pair.A)))}
            yield from _wrong_shapes(layer, expected | {"lora_magnitude_vector": (pair.magnitude, (width,))})
        else:
            yield f"it has no embedding {shown(layer, SHOWN_NAME)}"
    for layer, tensors in foreign.whole.items():
        yield from _whole_misfits(layer, tensors, modules.get(layer), model)
    yield from _vocabulary_misfits(foreign, model)
    for layer, (ids, rows) in foreign.rows.items():
        yield from _row_misfits(foreign, layer, ids, rows, model)
    for name in foreign.modules_to_save:
        # A name for layers that the base has not says nothing: PEFT lists the usual names of classifiers by itself.
        of_base = [layer for layer in modules if layer.endswith(name)]
        if of_base and not any(saved == layer or saved.startswith(f"{layer}.") for layer in of_base for saved in foreign.whole):
            yield f"lacks the tensors of {shown(name, SHOWN_NAME)}, which {CONFIG} has in modules_to_save"


def _pair_misfits(layer: str, pair: Pair, shape: tuple[int, int], has_bias: bool) -> Iterator[str]:
    out, width = shape
    rank = len(pair.A)
    expected = {"lora_A.weight": (pair.A, (rank, width)), "lora_B.weight": (pair.B, (out, rank)), "lora_B.bias": (pair.bias, (out,))}
    yield from _wrong_shapes(layer, expected | {"lora_magnitude_vector": (pair.magnitude, (out,))})
    if pair.bias is not None and not has_bias:
        yield f"{full_name(layer, 'lora_B.bias')} is trained, and the base's layer has no bias that could hold it (lora_bias)"
    if pair.bias is not None and pair.magnitude is not None:
        yield f"{full_name(layer, 'lora_B.bias')}: DoRA with lora_bias is not read"


def _wrong_shapes(layer: str, expected: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> Iterator[str]:
    for part, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            yield f"{full_name(layer, part)} is {list(tensor.shape)}, needed is {list(shape)}"


def _whole_misfits(layer: str, tensors: dict[str, Tensor], module: nn.Module | None, model: PreTrainedModel) -> Iterator[str]:
    own = {} if module is None else _own_shapes(module)
    is_vocabulary = module is not None and module in (model.get_input_embeddings(), model.get_output_embeddings())
    for name, tensor in tensors.items():
        if name not in own:
            yield f"has {full_name(layer, name)}, which nothing here takes"
        # Of a vocabulary that grew or shrank with the tokenizer only the number of rows may be another.
        elif tuple(tensor.shape[is_vocabulary:]) != own[name][is_vocabulary:] or not tensor.numel():
            yield f"{full_name(layer, name)} is {list(tensor.shape)}, needed is {list(own[name])}"


def _own_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    if is_linear(module) or is_embedding(module):
        bias = getattr(module, "bias", None)
        return {"weight": matrix_shape(module)} | ({} if bias is None else {"bias": tuple(bias.shape)})
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tuple(tensor.shape) for name, tensor in own}


def _vocabulary_misfits(foreign: ForeignAdapter, model: PreTrainedModel) -> Iterator[str]:
    """Yield where embedding and head would have different numbers of rows, or the head's bias another than its weight."""
    names, is_tied = _vocabulary_names(model), head_tied_to(model) is not None
    before = {name: matrix_shape(model.get_submodule(name))[0] for name in names}
    after = {name: _rows_after(foreign, name, model.get_submodule(name)) for name in names}
    embedding, *heads = names
    for head in heads:
        follows = is_tied and "weight" not in foreign.whole.get(head, {})
        if not follows and after[head] != after[embedding] and before[head] == before[embedding]:
            yield f"{embedding} has {after[embedding]} rows with it, and {head} {after[head]}: the adapter lacks one of them"
        bias = foreign.whole.get(head, {}).get("bias", getattr(model.get_submodule(head), "bias", None))
        if bias is not None and len(bias) != after[head]:
            yield f"{head} has {after[head]} rows with it, and a bias of {len(bias)}"


def _vocabulary_names(model: PreTrainedModel) -> list[str]:
    """Return the dotted names of ``model``'s input embedding and of its output head, if it has one."""
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]


def _rows_after(foreign: ForeignAdapter, layer: str, module: nn.Module) -> int:
    """Return how many rows the embedding or head ``layer`` has with the adapter on."""
    weight = foreign.whole.get(layer, {}).get("weight")
    return matrix_shape(module)[0] if weight is None or not weight.dim() else len(weight)


def _row_misfits(foreign: ForeignAdapter, layer: str, ids: list[int], rows: Tensor, model: PreTrainedModel) -> Iterator[str]:
    module, name = dict(model.named_modules()).get(layer), full_name(layer, "token_adapter.trainable_tokens_delta")
    if module is None or module not in (model.get_input_embeddings(), model.get_output_embeddings()):
        yield f"has {name}, which nothing here takes: {shown(layer, SHOWN_NAME)} is neither the embedding nor the output head"
        return
    if layer in foreign.linears or layer in foreign.embeddings or head_tied_to(model) in foreign.linears:
        yield f"{name}: single rows of a layer that has a low-rank update, too, are not read"
    count, width = _rows_after(foreign, layer, module), matrix_shape(module)[1]
    if rows.shape[1] != width:
        yield f"{name} is {list(rows.shape)}, needed is {[len(ids), width]}"
    if max(ids) >= count:
        yield (
            f"{name} trains token {max(ids)}, and the base has {count} rows: the base was given more before it was trained; resize it "
            "(model.resize_token_embeddings) and give the folder that it is saved in"
        )


# Putting it on. Each returns whether it changes anything.


def _put_whole(foreign: ForeignAdapter, model: PreTrainedModel) -> bool:
    tied_head, embedding = head_tied_to(model), _vocabulary_names(model)[0]
    changes, rows_before = False, matrix_shape(model.get_submodule(embedding))[0]
    for layer, tensors in foreign.whole.items():
        for name, tensor in tensors.items():
            if _differs(own := model.get_submodule(layer), name, tensor):
                changes = True
                if name == "weight" and (is_linear(own) or is_embedding(own)):
                    _set_matrix(model, layer, tensor)
                else:
                    put(own, name, tensor.to(own.get_parameter(name) if name in own._parameters else own.get_buffer(name)))
    table = model.get_submodule(embedding)
    has_other_rows = (rows := matrix_shape(table)[0]) != rows_before
    if has_other_rows:
        model.config.get_text_config().vocab_size = rows
    if tied_head is not None and _stays_tied(foreign, embedding, tied_head, has_other_rows):
        _set_matrix(model, tied_head, table.weight)
        model.get_submodule(tied_head).weight = table.weight
    return changes


def _stays_tied(foreign: ForeignAdapter, embedding: str, head: str, has_other_rows: bool) -> bool:
    """Return whether a head that was the embedding's tensor is that of the replaced embedding, too."""
    its, heads = (foreign.whole.get(layer, {}).get("weight") for layer in (embedding, head))
    # PEFT saves both where they are tied; of a whole embedding that is saved alone, its head keeps the base's.
    return has_other_rows if heads is None else its is not None and torch.equal(its, heads)


def _differs(own: nn.Module, name: str, tensor: Tensor) -> bool:
    """Return whether ``tensor`` is another than the module's own, in the digits that it is saved in."""
    is_matrix = name == "weight" and matrix_of(own) is not None
    value = dense_matrix(own) if is_matrix else getattr(own, name).detach()
    return value.shape != tensor.shape or not torch.equal(value.to(tensor), tensor)


def _set_matrix(model: PreTrainedModel, layer: str, weight: Tensor) -> None:
    """Let the linear or embedding ``layer`` be dense, and its weight ``weight`` [rows, D], with as many rows as that has."""
    if not isinstance(model.get_submodule(layer), Whole):
        train_whole(model, [layer])
    module = model.get_submodule(layer)
    # A new one: what it replaces may be the head's, too.
    module.weight = nn.Parameter(weight.detach().to(module.weight), requires_grad=False)
    setattr(module, "out_features" if is_linear(module) else "num_embeddings", len(weight))


def _put_on_linear(model: PreTrainedModel, layer: str, pair: Pair) -> bool:
    base = model.get_submodule(layer)
    if pair.bias is not None:
        put(base, "bias", (base.bias + pair.scaling * pair.bias.to(base.bias)).detach())
    adapted = (LoRALinear if pair.magnitude is None else DoRALinear)(base, len(pair.A), pair.scaling, 0.0)
    is_stretched = pair.magnitude is not None and _is_stretched(pair.magnitude, adapted.lora_magnitude_vector.detach())
    # What is wider than the base computes in keeps its digits: it is to be merged.
    given = {adapted.lora_A: pair.A, adapted.lora_B: pair.B}
    for factor, tensor in given.items():
        factor.weight.data = tensor.to(factor.weight.device, torch.promote_types(tensor.dtype, compute_dtype(base)))
    if pair.magnitude is not None:
        adapted.lora_magnitude_vector.data = pair.magnitude.to(adapted.lora_magnitude_vector)
    put_module(model, layer, adapted)
    return _moves(pair) or is_stretched or (pair.bias is not None and bool(pair.bias.any()))


def _put_factors(model: PreTrainedModel, layer: str, factors: Tensor) -> bool:
    scaled = ScaledLinear(model.get_submodule(layer), scales_input=len(factors) == 1)
    scaled.ia3_l.data = factors.to(scaled.ia3_l.device, torch.promote_types(factors.dtype, scaled.ia3_l.dtype))
    put_module(model, layer, scaled)
    return bool((factors != 1).any())


def _put_on_embedding(model: PreTrainedModel, layer: str, pair: Pair) -> bool:
    """Put W + s (B A)^T in the place of the table W, or with DoRA's lengths m that with its columns as long as m says."""
    table = dense_matrix(model.get_submodule(layer))
    A, B = (tensor.to(table) for tensor in (pair.A, pair.B))
    updated = torch.addmm(table, A.T, B.T, alpha=pair.scaling)
    is_stretched = False
    if pair.magnitude is not None:
        is_stretched = _is_stretched(pair.magnitude.to(table), table.norm(dim=0))
        updated *= pair.magnitude.to(table) / updated.norm(dim=0)
    _set_matrix(model, layer, updated)
    return _moves(pair) or is_stretched


def _moves(pair: Pair) -> bool:
    return bool(pair.A.any() and pair.B.any())


def _is_stretched(magnitude: Tensor, lengths: Tensor) -> bool:
    """Return whether DoRA's lengths are others than the base's, by more than rounding."""
    return bool(((magnitude.to(lengths) - lengths).abs() > ROUNDED * lengths).any())


def _put_rows(foreign: ForeignAdapter, model: PreTrainedModel) -> bool:
    changes, given = False, dict(foreign.rows)
    tied_head = head_tied_to(model)
    others = [rows for layer, rows in given.items() if layer != tied_head]
    if tied_head in given and any(given[tied_head][0] == ids and torch.equal(given[tied_head][1], rows) for ids, rows in others):
        del given[tied_head]  # saved twice: the embedding's are the head's
    train_rows(model, {layer: ids for layer, (ids, _) in given.items()})
    for layer, (ids, rows) in given.items():
        own = model.get_submodule(layer).token_adapter.trainable_tokens_delta
        rows = rows[torch.tensor(ids).argsort()]  # ours stand in the order of the tokens
        changes |= not torch.equal(own.detach().to(rows), rows)
        own.data = rows.to(own)
    return changes
