"""Adapters as PEFT's two files: adapter_config.json and adapter_model.safetensors. Written and read without PEFT."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from qlite.errors import AdapterError, shown, some_of
from qlite.files import make_folder, write_json, write_tensors
from qlite.given import require_sound_table
from qlite.methods.base import PEFT_PREFIX, Method, adapted_linears, saved_tensors, short_names, stand_ins
from qlite.methods.lora import LoRA, LoRALinear
from qlite.methods.low_rank import LowRank
from qlite.methods.token_rows import RowsEmbedding, RowsLinear
from qlite.methods.whole import Whole

PREFIX, LORA_A, LORA_B, LENGTHS = PEFT_PREFIX, ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
WEIGHTS, CONFIG, PEFT = "adapter_model.safetensors", "adapter_config.json", "peft"

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST_PROBLEMS = 5
"""In one message."""
SHOWN_NAME = 200
"""Characters of a tensor's name in a message."""


def full_name(layer: str, part: str) -> str:
    """Return the name in PEFT's file of a layer's ``part``, as a message can hold it."""
    return shown(f"{PREFIX}{layer}.{part}", SHOWN_NAME)


def adapter_tensors(model: nn.Module, resumable: bool = False) -> dict[str, Tensor]:
    """Return all that a method has learned, under the names of PEFT's files; ``resumable``: as a checkpoint has it."""
    return {PREFIX + name: p for name, p in saved_tensors(model, resumable).items()}


def write_adapter(folder: Path, model: nn.Module, method: Method, base_name: str, metadata: dict[str, str] | None = None) -> None:
    """Write ``model``'s adapter into ``folder``, with ``metadata``; adapter_config.json only where PEFT has the method's type.

    Where PEFT has other tensors than the model, its two files stand in the folder PEFT beneath.
    """
    own = adapter_tensors(model)
    write_tensors(folder / WEIGHTS, own, metadata)
    found = method.peft(model)
    if found is None and not isinstance(method, LoRA):
        return
    fields, tensors = found or ({}, own)
    is_same = tensors.keys() == own.keys()
    place = folder if is_same else folder / PEFT
    if not is_same:
        make_folder(place)
        write_tensors(place / WEIGHTS, tensors, metadata)
    general = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True}
    write_json(place / CONFIG, {**(peft_config(model, method, base_name) if isinstance(method, LoRA) else general), **fields})


def peft_config(model: nn.Module, method: LoRA, base_name: str) -> dict:
    """Return the content of PEFT's adapter_config.json for ``model``'s LoRA layers."""
    layers = {name: layer for name, layer in adapted_linears(model) if isinstance(layer, LoRALinear)}
    targets = short_names(model, list(layers))
    ranks = {name: layer.rank for name, layer in layers.items() if layer.rank != method.rank}
    alphas = {name: method.alpha_of(name) for name in layers if method.alpha_of(name) != method.alpha}
    # Whole names: PEFT takes whatever ends with one of them, and "norm" alone would be every norm of every block.
    whole = [name for name, module in stand_ins(model) if isinstance(module, Whole)]
    rows = {name: module.ids.tolist() for name, module in stand_ins(model) if _has_own_rows(module)}
    config = _config(method, targets, base_name) | {"rank_pattern": ranks, "alpha_pattern": alphas}
    return config | {"modules_to_save": whole or None, "trainable_token_indices": rows or None}


def _config(method: LoRA, targets: list[str], base_name: str) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": method.rank,
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "target_modules": targets,
        "rank_pattern": {},
        "use_rslora": method.rslora,
        "use_dora": method.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def write_updates(folder: Path, updates: dict[str, LowRank], base_name: str | None, metadata: dict[str, str] | None = None) -> None:
    """Write ``updates``, what an adapter does to each linear by its dotted name, as PEFT's two files in float32, with ``metadata``.

    PEFT scales every linear by lora_alpha over its own rank, so what is left of each one's scaling goes into its B.
    """
    ranks = {layer: update.rank for layer, update in updates.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    tensors = {}
    for layer, update in updates.items():
        assert update.lengths is None, "rows' lengths would need DoRA's file"
        tensors[f"{PREFIX}{layer}{LORA_A}"] = update.A.float()
        tensors[f"{PREFIX}{layer}{LORA_B}"] = update.B.float() * (update.scaling * update.rank / usual)
    write_tensors(folder / WEIGHTS, tensors, metadata)
    config = _config(LoRA(rank=usual, alpha=float(usual)), list(ranks), base_name or "")
    write_json(folder / CONFIG, {**config, "rank_pattern": {layer: rank for layer, rank in ranks.items() if rank != usual}})


def _has_own_rows(module: nn.Module) -> bool:
    """Return whether ``module`` trains rows that are not the embedding's."""
    return isinstance(module, RowsEmbedding) or (isinstance(module, RowsLinear) and not module.is_tied)


def load_adapter(folder: Path, model: nn.Module) -> None:
    """Copy the adapter in ``folder`` into ``model``, to which the same method is attached.

    Raises:
        AdapterError: names or shapes differ from what is attached; all of them in one message.
    """
    copy_adapter(read_tensors(folder), model, folder)


def copy_adapter(tensors: dict[str, Tensor], model: nn.Module, origin: Path, resumable: bool = False) -> None:
    """Copy ``tensors`` into what is attached to ``model``; ``origin`` is only named in messages; ``resumable``: a checkpoint's.

    Raises:
        AdapterError: names or shapes differ from what is attached; all of them in one message.
    """
    own = adapter_tensors(model, resumable)
    require_alike(tensors, own, origin)
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name])


def require_alike(tensors: dict[str, Tensor], expected: dict[str, Tensor], origin: Path) -> None:
    """Raise AdapterError unless ``tensors`` have the names and shapes of ``expected``, and are finite; all problems in one message."""
    problems = [f"lacks {name}" for name in expected.keys() - tensors.keys()]
    problems += [f"has {shown(name, SHOWN_NAME)}, which nothing here takes" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name} is {list(tensors[name].shape)}, needed is {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    problems += _not_finite(tensors)
    if problems:
        raise AdapterError(f"{origin}: the adapter does not fit this base: {some_of(sorted(problems), MOST_PROBLEMS)}")


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    return [f"{shown(name, SHOWN_NAME)} has values that are not finite" for name, tensor in tensors.items() if not tensor.isfinite().all()]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder by name. Raises AdapterError."""
    path = folder / WEIGHTS
    if not path.is_file() and any(folder.glob("adapter_model.bin")):
        raise AdapterError(f"{folder}: has only adapter_model.bin, which is pickle and never read; save it as safetensors")
    try:
        require_sound_table(path)
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:  # KeyError: a dtype that torch has not
        why = getattr(error, "strerror", None) or error
        raise AdapterError(f"{path}: cannot be read as safetensors: {why}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise AdapterError(f"{path}: {shown(name, SHOWN_NAME)} is {str(tensor.dtype)[6:]}, and adapters are 16 or 32 bit floats")
    return tensors


def read_metadata(folder: Path) -> dict[str, str]:
    """Return what the tensors of an adapter folder say beside themselves, by key; nothing where they cannot be read."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}
