"""Adapters as PEFT's two files: adapter_config.json and adapter_model.safetensors. Written and read without PEFT."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qlite.errors import AdapterError, RecipeError, shown
from qlite.files import write_json, write_tensors
from qlite.given import MOST_JSON_BYTES, parse_json, read_given, require_sound_table
from qlite.methods.base import Method, adapted_linears, stand_ins, trainable_tensors
from qlite.methods.lora import LoRA
from qlite.methods.whole import Whole
from qlite.quant.linear import is_linear

PREFIX, LORA_A, LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# PEFT 0.21's options that are read here, follow from the tensors, only guide training, or only say where the adapter is from.
READ_OR_WITHOUT_EFFECT = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHOWN_NAME = 200
"""Characters of a tensor's name in a message."""
# The other named starts (pissa, olora, corda, loftq, lora_ga, mica) take something from the base's weights or out of training.
STARTS_THAT_LEAVE_THE_BASE = {"gaussian", "eva", "orthogonal"}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all that a method has trained, under the names of PEFT's files."""
    return {PREFIX + name: p for name, p in trainable_tensors(model).items()}


def write_adapter(folder: Path, model: nn.Module, method: Method, base_name: str) -> None:
    """Write ``model``'s adapter into ``folder``; adapter_config.json only where PEFT has the method's type."""
    write_tensors(folder / WEIGHTS, adapter_tensors(model))
    if isinstance(method, LoRA):
        write_json(folder / CONFIG, peft_config(model, method, base_name))


def peft_config(model: nn.Module, method: LoRA, base_name: str) -> dict:
    """Return the content of PEFT's adapter_config.json for ``model``'s LoRA layers."""
    layers = dict(adapted_linears(model))
    leaves = {name.rpartition(".")[2] for name in layers}
    # Leaf names where they say exactly which layers are meant; else every layer by its whole name.
    same_leaf = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves]
    targets = sorted(leaves) if len(same_leaf) == len(layers) else list(layers)
    ranks = {name: layer.rank for name, layer in layers.items() if layer.rank != method.rank}
    alphas = {name: method.alpha_of(name) for name in layers if method.alpha_of(name) != method.alpha}
    # Whole names: PEFT takes whatever ends with one of them, and "norm" alone would be every norm of every block.
    whole = [name for name, module in stand_ins(model) if isinstance(module, Whole)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": method.rank,
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "target_modules": targets,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": whole or None,
        "use_rslora": method.rslora,
        "use_dora": method.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def load_adapter(folder: Path, model: nn.Module) -> None:
    """Copy the adapter in ``folder`` into ``model``, to which the same method is attached.

    Raises:
        AdapterError: names or shapes differ from what is attached; all of them in one message.
    """
    copy_adapter(read_tensors(folder), model, folder)


def copy_adapter(tensors: dict[str, Tensor], model: nn.Module, origin: Path, keep_dtype: bool = False) -> None:
    """Copy ``tensors`` into what is attached to ``model``; ``origin`` is only named in messages.

    ``keep_dtype``: take float32 tensors as they are instead of rounding them to what training holds, for merging.

    Raises:
        AdapterError: names or shapes differ from what is attached; all of them in one message.
    """
    own = adapter_tensors(model)
    problems = [f"lacks {name}" for name in own.keys() - tensors.keys()]
    problems += [f"has {shown(name, SHOWN_NAME)}, which nothing here takes" for name in tensors.keys() - own.keys()]
    problems += [
        f"{name} is {list(tensors[name].shape)}, needed is {list(p.shape)}"
        for name, p in own.items()
        if name in tensors and tensors[name].shape != p.shape
    ]
    problems += [f"{shown(name, SHOWN_NAME)} has values that are not finite" for name, t in tensors.items() if not t.isfinite().all()]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise AdapterError(f"{origin}: the adapter does not fit this base: {'; '.join(sorted(problems)[:5])}{more}")
    with torch.no_grad():
        for name, p in own.items():
            if keep_dtype:
                p.data = tensors[name].to(p.device)
            else:
                p.copy_(tensors[name])


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


@dataclass(frozen=True)
class ForeignAdapter:
    """A LoRA adapter that another program wrote: the method to attach and the tensors to copy in."""

    method: LoRA
    tensors: dict[str, Tensor]

    def put_on(self, model: nn.Module, origin: Path) -> None:
        """Attach the adapter to ``model`` with its tensors as they are; ``origin`` is only named in messages.

        Raises:
            AdapterError: it does not fit ``model``.
        """
        layers = {name for name, module in model.named_modules() if is_linear(module)}
        unknown = [name for name in self.layers if name not in layers]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            name = shown(unknown[0], SHOWN_NAME)
            raise AdapterError(f"{origin}: the adapter does not fit this base: it has no linear layer {name}{more}")
        try:
            self.method.attach(model)
        except RecipeError as error:
            raise AdapterError(f"{origin}: the adapter does not fit this base: {error}") from error
        copy_adapter(self.tensors, model, origin, keep_dtype=True)
        if not self.method.dora and not any(tensor.any() for name, tensor in self.tensors.items() if name.endswith(LORA_B)):
            raise AdapterError(f"{origin}: every *{LORA_B} is zero, so the adapter changes nothing of its base; was it ever trained?")

    @property
    def layers(self) -> list[str]:
        """The dotted names of the adapted linears."""
        return list(_lora_A(self.tensors))


def read_foreign_adapter(folder: Path) -> ForeignAdapter:
    """Return the PEFT adapter in ``folder`` as a method and tensors of ours.

    Raises:
        AdapterError: its type or one of its options is not supported, or its files do not fit each other.
    """
    config, tensors = _read_config(folder / CONFIG), read_tensors(folder)
    _refuse_unsupported(config, folder / CONFIG)
    ranks = {name: t.shape[0] if t.dim() == 2 else 0 for name, t in _lora_A(tensors).items()}
    if not ranks:
        raise AdapterError(f"{folder / WEIGHTS}: holds no tensor called *.lora_A.weight; is it a LoRA adapter?")
    said = {config["r"], *(config.get("rank_pattern") or {}).values()}
    for name, rank in ranks.items():
        if rank not in said:
            told = f"{shown(name, SHOWN_NAME)} has rank {rank}, and {CONFIG} says r = {config['r']} and no such rank_pattern"
            raise AdapterError(f"{folder / WEIGHTS}: {told}; the two files are not of one adapter")
    method = LoRA(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        targets=tuple(_literal(name) for name in ranks),
        rank_per_target={_literal(name): rank for name, rank in ranks.items() if rank != config["r"]},
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
    )
    return ForeignAdapter(method, tensors)


def _lora_A(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each adapted layer's A by the layer's dotted name."""
    return {name[len(PREFIX) : -len(LORA_A)]: t for name, t in tensors.items() if name.startswith(PREFIX) and name.endswith(LORA_A)}


def _read_config(path: Path) -> dict:
    try:
        config = parse_json(read_given(path, MOST_JSON_BYTES), says_once=True)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror}); a PEFT adapter has this file") from error
    except ValueError as error:
        raise AdapterError(f"{path}: not JSON ({error})") from error
    rank, alpha = (config.get("r"), config.get("lora_alpha")) if isinstance(config, dict) else (None, None)
    if type(rank) is not int or type(alpha) not in (int, float):
        raise AdapterError(f'{path}: "r" and "lora_alpha" must be numbers')
    if rank < 1 or not 0 < alpha <= sys.float_info.max:
        raise AdapterError(
            f'{path}: "r" must be 1 or more and "lora_alpha" more than 0 and finite; these are {shown(str(rank)[:20])} and {alpha}'
        )
    ranks = config.get("rank_pattern") or {}
    if not isinstance(ranks, dict) or not all(type(each) is int for each in ranks.values()):
        raise AdapterError(f"{path}: rank_pattern must be an object of whole numbers")
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key), bool | None):
            raise AdapterError(f"{path}: {key} must be true or false")
    return config


def _refuse_unsupported(config: dict, path: Path) -> None:
    """Raise AdapterError for whatever would be lost silently."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f'peft_type is {config.get("peft_type")!r}, only "LORA" is read')
    if config.get("bias", "none") != "none":
        problems.append(f"bias = {config['bias']!r}: trained biases are not read")
    if isinstance(init := config.get("init_lora_weights"), str) and init not in STARTS_THAT_LEAVE_THE_BASE:
        problems.append(f"init_lora_weights = {init!r} changed the base too: save it anew with path_initial_model_for_weight_conversion")
    problems += [f"{key} = {value!r} is not supported" for key, value in config.items() if value and key not in READ_OR_WITHOUT_EFFECT]
    if problems:
        raise AdapterError(f"{path}: " + "; ".join(problems))


def _literal(name: str) -> str:
    """Return ``name`` as a pattern that matches nothing else."""
    return name.replace("[", "[[]")
