"""A merged model as a Hugging Face folder: sharded safetensors, config, tokenizer and generation config.

Each weight is made dense, merged in float32, rounded once to the target dtype, written and dropped: no more than one is in memory at
a time, however large a file is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlite.errors import ExportError, NotMergeable
from qlite.files import write_json, write_tensor_file
from qlite.formats.unfinished import Unfinished, unfinished_folder
from qlite.methods.base import AdaptedLinear, Beside, StandIn, adapted_linears, is_itself_trained, stand_ins, trainable_tensors
from qlite.methods.token_rows import RowsEmbedding, RowsLinear
from qlite.methods.whole import Whole
from qlite.model.load import file_names
from qlite.model.originals import Originals
from qlite.model.wheel import Progress
from qlite.quant.dense import dense_matrix, matrix_shape
from qlite.quant.embedding import QuantEmbedding, matrix_of
from qlite.quant.linear import Packed, QuantLinear
from qlite.room import require_space
from qlite.units import GIB, format_bytes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 * GIB
"""Largest weight file. Only one tensor is in memory, however large it is."""
PIECE = 1 << 24
"""Values that are rounded together."""


@dataclass(frozen=True)
class Dense:
    """One tensor of the merged model, made only when asked for."""

    name: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]
    """Gives it some rows at a time, or whole."""
    dtype: torch.dtype | None = None
    """Its own, where it stays what it is: whole numbers do."""

    def whole(self) -> Tensor:
        """Return it in one piece."""
        return joined(self.parts())


def write_merged(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    dtype: torch.dtype,
    progress: Progress,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``model`` with its adapter merged over its own weights into ``folder``, in ``dtype``, with all that belongs to it.

    Raises: as ``write_weights``.
    """
    with unfinished_folder(folder, None) as made:
        write_weights(made, model, dtype, progress, shard_bytes)
        write_company(made.path, tokenizer, generation_config)


def write_company(folder: Path, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> None:
    """Write what stands beside the weights in ``folder``."""
    tokenizer.save_pretrained(folder)
    if generation_config is not None:
        generation_config.save_pretrained(folder)


def ended_by(config: GenerationConfig, stop_ids: Sequence[int]) -> GenerationConfig:
    """Return ``config`` with ``stop_ids`` among the tokens at which an answer ends."""
    own = config.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    if not set(stop_ids) <= set(own):
        config = deepcopy(config)
        config.eos_token_id = sorted({*own, *stop_ids})
    return config


def write_weights(
    made: Unfinished,
    model: PreTrainedModel,
    dtype: torch.dtype,
    progress: Progress,
    shard_bytes: int = SHARD_BYTES,
    originals: Originals | None = None,
) -> None:
    """Write the merged weights and their config into ``made``, but for the files that are finished there.

    ``originals``: merge over these weights, not over what the base's storage has made of them.

    Raises:
        NotMergeable: the adapter is more than changed weights.
        ExportError: values do not fit ``dtype`` or are not finite.
        MachineError: the disk does not take it.
    """
    tensors = list(merged_tensors(model, originals))
    in_files = file_names(model, (tensor.name for tensor in tensors))
    require_room(made, model, dtype)
    write_shards(made, tensors, in_files, dtype, partial(progress, "merge"), shard_bytes)
    _write_config(made.path, model, dtype, {tensor.name for tensor in tensors})


def require_room(made: Unfinished, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raise DiskError unless the disk takes what ``made`` still lacks of ``model``'s merged weights in ``dtype``."""
    total = total_bytes(list(merged_tensors(model)), dtype)
    there = sum(path.stat().st_size for path in made.path.glob("*.safetensors"))
    require_space(made.path.parent, total - there, f"{format_bytes(total)} of {str(dtype)[6:]} weights")


def write_shards(
    made: Unfinished,
    tensors: list[Dense],
    in_files: dict[str, str],
    dtype: torch.dtype,
    told: Callable[[int, int], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``tensors`` into ``made``, each under its name ``in_files``, but for the files that are finished there.

    ``told`` hears how many bytes of how many are done.
    """
    shards, total = _shards(tensors, shard_bytes // dtype.itemsize), total_bytes(tensors, dtype)
    done, places = 0, {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        table = {in_files[tensor.name]: (tensor.dtype or dtype, tensor.shape) for tensor in shard}
        if not made.has(file):
            pieces = (part for tensor in shard for part in cast(tensor, dtype))
            write_tensor_file(made.path / file, table, _telling(pieces, done, total, told))
            made.keep(file)
        done += total_bytes(shard, dtype)
        places |= dict.fromkeys(table, file)
    if len(shards) > 1:
        write_json(made.path / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def total_bytes(tensors: list[Dense], dtype: torch.dtype) -> int:
    """Return the bytes of ``tensors`` in a file whose floating-point tensors are ``dtype``."""
    return sum(_size(tensor) * (tensor.dtype or dtype).itemsize for tensor in tensors)


def _telling(pieces: Iterator[Tensor], done: int, total: int, told: Callable[[int, int], None]) -> Iterator[Tensor]:
    for piece in pieces:
        done += piece.nbytes
        told(done, total)
        yield piece


def merged_tensors(model: PreTrainedModel, originals: Originals | None = None) -> Iterator[Dense]:
    """Yield every tensor of the merged model under its module's name, in model order, tied ones once.

    ``originals``: where what is frozen is taken from, and what is adapted is merged over; without them, from ``model`` itself.

    Raises:
        NotMergeable: something is trained that is no weight of the base and no part of what stands in its place.
    """
    adapted = tuple(f"{name}." for name, _ in stand_ins(model))
    _refuse_the_rest(model, adapted)
    assert originals is None or not is_itself_trained(model), "what was trained has no other original"
    seen: set[int] = set()
    inner: set[nn.Module] = set()
    for prefix, module in model.named_modules():
        if module in inner:
            continue
        if isinstance(module, StandIn | QuantEmbedding):
            inner |= set(module.modules())
        yield from _tensors_of(prefix, module, seen, originals)


def _tensors_of(prefix: str, module: nn.Module, seen: set[int], originals: Originals | None) -> Iterator[Dense]:
    linear = module.frozen if isinstance(module, AdaptedLinear) else module.base if isinstance(module, RowsEmbedding) else module
    dot = f"{prefix}." if prefix else ""
    weight = f"{dot}weight"

    def has_original(name: str) -> bool:
        # What was trained has no other original, whoever stands on it.
        return originals is not None and not isinstance(linear, Whole) and name in originals

    def frozen(name: str, otherwise: Callable[[], Iterable[Tensor]]) -> Iterable[Tensor]:
        """Return what the original is, or else what the model has."""
        return originals.parts(name) if has_original(name) else otherwise()

    if isinstance(module, RowsLinear) and module.is_tied:
        pass  # the embedding's tensor is the head's
    elif isinstance(module, AdaptedLinear | RowsEmbedding):
        is_original = has_original(weight)
        yield Dense(weight, matrix_shape(linear), lambda: [_merged(module, frozen(weight, lambda: [dense_matrix(linear)]), is_original)])
    elif (matrix := matrix_of(module)) is not None and id(matrix.weight) not in seen:
        seen.add(id(matrix.weight))
        yield Dense(weight, (matrix.out_features, matrix.in_features), lambda: frozen(weight, lambda: _by_rows(matrix)))
    if isinstance(module, AdaptedLinear | RowsEmbedding | QuantLinear | QuantEmbedding):
        if getattr(linear, "bias", None) is not None:
            yield Dense(f"{dot}bias", tuple(linear.bias.shape), lambda: _merged_bias(module, frozen(f"{dot}bias", lambda: [linear.bias])))
        elif isinstance(module, AdaptedLinear) and module.merged_bias(None) is not None:
            raise NotMergeable(f"{prefix} has got a bias, and this family's has none")
        return

    def own_value(name: str, tensor: Tensor) -> Iterable[Tensor]:
        return [tensor] if tensor.requires_grad else frozen(name, lambda: [tensor])

    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, tensor in own:
        if name not in module._non_persistent_buffers_set and id(tensor) not in seen:
            seen.add(id(tensor))
            yield Dense(dot + name, tuple(tensor.shape), partial(own_value, dot + name, tensor), _whole(tensor))


def _merged(module: AdaptedLinear | RowsEmbedding, parts: Iterable[Tensor], is_original: bool) -> Tensor:
    if isinstance(module, RowsEmbedding):
        return module.merged_weight(joined(part.to(module.weight.device, torch.float32) for part in parts))
    dense = joined(part.to(module.frozen.weight.device, torch.float32) for part in parts)
    return module.merged(module.unquantised(dense) if is_original else dense)


def _merged_bias(module: nn.Module, parts: Iterable[Tensor]) -> Iterable[Tensor]:
    if not isinstance(module, AdaptedLinear):
        return parts
    return [module.merged_bias(joined(part.to(module.frozen.bias.device, torch.float32) for part in parts))]


def joined(parts: Iterable[Tensor]) -> Tensor:
    """Return the tensor of which ``parts`` are the rows, some at a time or all at once."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_rows(matrix: Packed) -> Iterator[Tensor]:
    return (matrix.dense(torch.float32, part) for part in matrix.slices(torch.float32))


def _refuse_the_rest(model: PreTrainedModel, adapted: tuple[str, ...]) -> None:
    with torch.device("meta"):
        plain = set(type(model)(model.config).state_dict())
    # What stands beside is told by its kind: in a run that is opened nothing is to be trained any more.
    extra = [name for name, module in model.named_modules() if isinstance(module, Beside)]
    extra += [name for name in trainable_tensors(model) if not name.startswith(adapted) and name not in plain]
    for _, module in adapted_linears(model):
        module.require_mergeable()
    if extra:
        raise NotMergeable(f"{extra[0]} is no weight of the base model")


def cast(tensor: Dense, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield ``tensor`` on the CPU in ``dtype``, some rows at a time; whole numbers stay what they are.

    Raises:
        ExportError: values are not finite, or are too large for ``dtype``.
    """
    with torch.no_grad():
        for part in tensor.parts():
            rows = max(1, PIECE // max(1, part[:1].numel())) if part.dim() else 1
            for piece in part.split(rows) if part.dim() else (part,):
                yield _rounded(tensor.name, piece, tensor.dtype or dtype).cpu() if piece.is_floating_point() else piece.cpu()


def _rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    bad = int((~value.isfinite()).sum())
    if bad:
        raise ExportError(f"{name}: {bad} values are not finite; this adapter or base is damaged, nothing was written")
    rounded = value.to(dtype)
    lost = int((~rounded.isfinite()).sum())
    if lost:
        raise ExportError(
            f"{name}: {lost} values up to {value.abs().max().item():.4g} do not fit {str(dtype)[6:]} "
            f"(largest {torch.finfo(dtype).max:.4g}); nothing was written. Use --dtype bf16"
        )
    return rounded


def _write_config(path: Path, model: PreTrainedModel, dtype: torch.dtype, names: set[str]) -> None:
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    # A head with a tensor of its own is no longer the embedding, whatever the base's config says: an adapted one, for example.
    head = model.get_output_embeddings()
    config.tie_word_embeddings = bool(config.tie_word_embeddings) and not any(
        module is head and f"{name}.weight" in names for name, module in model.named_modules()
    )
    config.save_pretrained(path)


def _shards(tensors: list[Dense], limit: int) -> list[list[Dense]]:
    """Return ``tensors`` in order, cut so that no shard has more than ``limit`` elements unless one tensor alone has."""
    shards: list[list[Dense]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + _size(tensor) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += _size(tensor)
    return shards


def _whole(tensor: Tensor) -> torch.dtype | None:
    return None if tensor.is_floating_point() else tensor.dtype


def _size(tensor: Dense) -> int:
    return torch.Size(tensor.shape).numel()
