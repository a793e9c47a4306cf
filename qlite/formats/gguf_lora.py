"""A LoRA adapter as a GGUF file that llama.cpp puts on its base: ``llama-server -m BASE.gguf --lora ADAPTER.gguf``.

llama.cpp adds alpha / rank * B A, with one alpha for the file and the rank of each pair of tensors. That is LoRA's own rule, so
ranks may differ from layer to layer; where the scale follows another (rsLoRA's alpha / sqrt(rank)), what is over goes into B. Rows of
B stand in the order of the base's rows. Source: llama.cpp, src/llama-adapter.cpp.
"""

from collections.abc import Callable
from pathlib import Path

from gguf import GGMLQuantizationType
from torch import Tensor

from qlite.errors import ExportError
from qlite.formats.gguf_file import GgufTensor, Value, padded, write_gguf
from qlite.formats.gguf_merged import general_fields, written_base
from qlite.methods.base import AdaptedLinear, adapted_linears, stand_ins
from qlite.methods.lora import LoRALinear
from qlite.model.load import LoadedBase
from qlite.model.wheel import Progress
from qlite.room import require_space
from qlite.units import format_bytes

SOURCE = "qlite.adapter_sha256"
"""Key of a GGUF adapter's metadata; llama.cpp passes over those that it does not know."""


def write_adapter_gguf(path: Path, base: LoadedBase, alpha: float, name: str, progress: Progress, source: str | None = None) -> int:
    """Write the adapter on ``base``'s model as the GGUF file ``path``, in a folder that is being made; return its bytes.

    ``alpha``: the method's, which the file says. Matrices are float32: exact, whatever was folded into B. ``source``: the SHA-256 of the
    file that the adapter is from, which this one then says.

    Raises:
        ExportError: it is no plain LoRA, or adapts what llama.cpp's base has no tensor of.
        MachineError: the disk does not take it.
    """
    written = written_base(base)
    tensors = []
    if others := [name for name, module in stand_ins(base.model) if not isinstance(module, AdaptedLinear)]:
        raise ExportError(f"{others[0]} is trained itself, and llama.cpp's adapters only add to linears; use --gguf f16, which merges it")
    for layer, module in adapted_linears(base.model):
        _require_plain(layer, module)
        place = written.names.get(f"{layer}.weight")
        if place is None:
            raise ExportError(
                f"{layer} is the embedding's own tensor in the base's GGUF file, and llama.cpp has none of its own to adapt; use --gguf f16"
            )
        tensors += _pair(place, module, alpha, lambda values, layer=layer: written.in_rows(f"{layer}.weight", values))
    if not tensors:
        raise ExportError("the run adapts no linear layer, so there is nothing for llama.cpp to put on; use --adapter")
    fields: dict[str, Value] = general_fields(name, "adapter", base, written.architecture)
    fields |= {"adapter.type": "lora", "adapter.lora.alpha": float(alpha), **({SOURCE: source} if source else {})}
    total = sum(padded(tensor.nbytes) for tensor in tensors)
    require_space(path, total, f"{format_bytes(total)} of adapter weights")
    write_gguf(path, fields, tensors, lambda done: progress("write adapter", done, total))
    return total


def _pair(place: str, module: LoRALinear, alpha: float, in_rows: Callable[[Tensor], Tensor]) -> list[GgufTensor]:
    update = module.update()
    scaled = update.B.float() * (update.scaling * update.rank / alpha)
    return [_tensor(f"{place}.lora_a", update.A.float()), _tensor(f"{place}.lora_b", in_rows(scaled))]


def _tensor(name: str, values: Tensor) -> GgufTensor:
    return GgufTensor(name, tuple(values.shape), GGMLQuantizationType.F32, lambda: values)


def _require_plain(layer: str, module: AdaptedLinear) -> None:
    """Raise ExportError for an adapted linear that B A does not say everything about."""
    if isinstance(module, LoRALinear) and module.only_adds:
        return
    what = "DoRA's magnitudes" if "lora_magnitude_vector" in dict(module.named_parameters()) else type(module).__name__
    raise ExportError(f"{layer}: llama.cpp's adapters have no place for {what}; use --gguf f16, which merges them")
