"""A merged model as a Hugging Face folder: sharded safetensors, config, tokenizer and generation config.

Each weight is dequantised, merged in float32, rounded once to the target dtype and dropped: no more than one shard is
in memory at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlite.errors import ExportError, NotMergeable
from qlite.files import new_folder, write_json, write_tensors
from qlite.methods.base import AdaptedLinear, trainable_tensors
from qlite.model.load import file_names
from qlite.model.wheel import Progress
from qlite.quant.embedding import QuantEmbedding, matrix_of
from qlite.quant.linear import QuantLinear, dense_weight
from qlite.room import require_space
from qlite.units import GIB, format_bytes

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Dense:
    """One tensor of the merged model, made only when asked for."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_merged(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    dtype: torch.dtype,
    progress: Progress,
    shard_bytes: int = GIB,
) -> None:
    """Write ``model`` with its adapter merged into ``folder``, in ``dtype``.

    Raises:
        NotMergeable: the adapter is more than changed weights.
        ExportError: values do not fit ``dtype`` or are not finite.
        MachineError: the disk does not take it.
    """
    tensors = list(merged_tensors(model))
    in_files = file_names(model, (tensor.name for tensor in tensors))
    shards = _shards(tensors, shard_bytes // dtype.itemsize)
    total = sum(_size(tensor) for tensor in tensors) * dtype.itemsize
    require_space(folder, total, f"{format_bytes(total)} of {str(dtype)[6:]} weights")
    done, places = 0, {}
    with new_folder(folder) as path:
        for number, shard in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            cast = {}
            for tensor in shard:
                cast[in_files[tensor.name]] = _cast(tensor, dtype)
                done += _size(tensor) * dtype.itemsize
                progress("merge", done, total)
            write_tensors(path / file, cast)
            places |= dict.fromkeys(cast, file)
        if len(shards) > 1:
            write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        _write_config(path, model, dtype, {tensor.name for tensor in tensors})
        tokenizer.save_pretrained(path)
        if generation_config is not None:
            generation_config.save_pretrained(path)


def merged_tensors(model: PreTrainedModel) -> Iterator[Dense]:
    """Yield every tensor of the merged model under its module's name, in model order, tied ones once.

    Raises:
        NotMergeable: something is trained that is no weight of the base and no part of an adapted linear.
    """
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, AdaptedLinear))
    _refuse_the_rest(model, adapted)
    seen: set[int] = set()
    inner: set[nn.Module] = set()
    for prefix, module in model.named_modules():
        if module in inner or (f"{prefix}.".startswith(adapted) and not isinstance(module, AdaptedLinear)):
            continue
        if isinstance(module, QuantEmbedding):
            inner |= set(module.modules())
        yield from _tensors_of(prefix, module, seen)


def _tensors_of(prefix: str, module: nn.Module, seen: set[int]) -> Iterator[Dense]:
    linear = module.base if isinstance(module, AdaptedLinear) else module
    dot = f"{prefix}." if prefix else ""
    if isinstance(module, AdaptedLinear):
        shape = (linear.out_features, linear.in_features)
        yield Dense(f"{dot}weight", shape, lambda: module.merged_weight(dense_weight(linear)))
    elif (matrix := matrix_of(module)) is not None and id(matrix.weight) not in seen:
        seen.add(id(matrix.weight))
        yield Dense(f"{dot}weight", (matrix.out_features, matrix.in_features), lambda: matrix.dense(torch.float32))
    if isinstance(module, AdaptedLinear | QuantLinear | QuantEmbedding):
        if getattr(linear, "bias", None) is not None:
            yield Dense(f"{dot}bias", tuple(linear.bias.shape), lambda: linear.bias)
        return
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, tensor in own:
        if name not in module._non_persistent_buffers_set and id(tensor) not in seen:
            seen.add(id(tensor))
            yield Dense(dot + name, tuple(tensor.shape), lambda tensor=tensor: tensor)


def _refuse_the_rest(model: PreTrainedModel, adapted: tuple[str, ...]) -> None:
    with torch.device("meta"):
        plain = set(type(model)(model.config).state_dict())
    extra = [name for name in trainable_tensors(model) if not name.startswith(adapted) and name not in plain]
    if extra:
        raise NotMergeable(f"{extra[0]} is no weight of the base model; export it with --adapter instead of --merge")


def _cast(tensor: Dense, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        value = tensor.make()
        if not value.is_floating_point():
            return value.cpu()
        bad = int((~value.isfinite()).sum())
        if bad:
            raise ExportError(f"{tensor.name}: {bad} values are not finite; this adapter or base is damaged, nothing was written")
        cast = value.to(dtype)
        lost = int((~cast.isfinite()).sum())
        if lost:
            raise ExportError(
                f"{tensor.name}: {lost} values up to {value.abs().max().item():.4g} do not fit {str(dtype)[6:]} "
                f"(largest {torch.finfo(dtype).max:.4g}); nothing was written. Use --dtype bf16"
            )
        return cast.cpu()


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


def _size(tensor: Dense) -> int:
    return torch.Size(tensor.shape).numel()
