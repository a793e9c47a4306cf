"""One GGUF file, written tensor by tensor: no more than one merged tensor is in memory, quantised a slice at a time.

Source: the format's specification, ggml/docs/gguf.md (version 3, little-endian). The gguf package's own writer wants a file of its
own and every value as a Python object; here values can also be the bytes that they are in another file.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUF_VERSION, GGMLQuantizationType
from torch import Tensor

from qlite.errors import ExportError
from qlite.files import new_file
from qlite.model.gguf_header import ARRAY, DEFAULT_ALIGNMENT, STRING

# Quantised at once: 4 MiB of float32.
CHUNK_VALUES = 2**20
# The specification's value types of what is written: bool before int, which it is a kind of.
KINDS = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}
# Arrays of numbers, where llama.cpp asks for signed ones: token types.
ARRAY_KINDS = {int: (5, "i"), float: (6, "f")}
# Their values, or the scales of their blocks, are 16-bit floats.
WIDE = {GGMLQuantizationType.F32, GGMLQuantizationType.BF16}
LARGEST = torch.finfo(torch.float16).max

Value = str | bool | int | float | list | bytes
"""A metadata value; bytes are a value as it stands in another GGUF file, its type in front."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file, made only when it is written."""

    name: str
    """llama.cpp's, such as "blk.0.attn_q.weight"."""
    shape: tuple[int, ...]
    """In torch's order: rows first."""
    kind: GGMLQuantizationType
    make: Callable[[], Tensor]
    """Returns the values, of ``shape``, in any float dtype."""

    @property
    def nbytes(self) -> int:
        """Its size in the file, without the padding behind it."""
        per_block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // per_block * block_bytes


def padded(size: int) -> int:
    """Return ``size`` bytes rounded up to where the next tensor may begin."""
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def write_gguf(path: Path, metadata: dict[str, Value], tensors: list[GgufTensor], told: Callable[[int], None]) -> None:
    """Write ``tensors`` and ``metadata`` as the GGUF file ``path``; ``told`` hears the bytes written after each tensor.

    Raises:
        ExportError: values are not finite, or do not fit the kind they are to be stored as.
        MachineError: the disk does not take it.
    """
    header = _header(metadata, tensors)
    with new_file(path) as stream:
        stream.write(header)
        done = 0
        for tensor in tensors:
            _write_tensor(stream, tensor)
            done += padded(tensor.nbytes)
            told(done)


def round_trip(values: Tensor, name: str, kind: GGMLQuantizationType) -> Iterator[Tensor]:
    """Yield ``values`` as they will be read out of a file that stores them as ``kind``: float32 on the CPU, some rows at a time.

    Raises:
        ExportError: they are not finite, or do not fit ``kind``.
    """
    values = values.detach().cpu()
    for part in values.split(max(1, CHUNK_VALUES // max(1, values[:1].numel()))):
        _require_fits(part, name, kind)
        content = np.ascontiguousarray(_stored(part.reshape(-1), kind)).reshape(1, -1).view(np.uint8)
        yield torch.from_numpy(gguf.dequantize(content, kind)).view(part.shape)


def encoded(value: Value) -> bytes:
    """Return a metadata value with its type in front: text, bool, uint32, float32, or an array of text, int32 or float32."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack("<I", ARRAY) + _array(value)
    kind, form = KINDS[type(value)]
    return struct.pack(f"<I{form}", kind, value)


def _array(values: list) -> bytes:
    if isinstance(values[0], str):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(map(_text, values))
    kind, form = ARRAY_KINDS[type(values[0])]
    return struct.pack(f"<IQ{len(values)}{form}", kind, len(values), *values)


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _header(metadata: dict[str, Value], tensors: list[GgufTensor]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", GGUF_VERSION, len(tensors), len(metadata))]
    parts += [_text(key) + encoded(value) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        parts.append(_text(tensor.name) + sizes + struct.pack("<IQ", tensor.kind, offset))
        offset += padded(tensor.nbytes)
    header = b"".join(parts)
    return header.ljust(padded(len(header)), b"\0")


@torch.no_grad()
def _write_tensor(stream: BinaryIO, tensor: GgufTensor) -> None:
    values = tensor.make().detach().cpu()
    assert tuple(values.shape) == tensor.shape, tensor.name
    written = sum(stream.write(content) for content in _quantised(values, tensor))
    assert written == tensor.nbytes, tensor.name
    stream.write(bytes(padded(written) - written))


def _quantised(values: Tensor, tensor: GgufTensor) -> Iterator[memoryview]:
    """Yield the tensor's bytes, CHUNK_VALUES at a time; blocks never run over the end of a row, so all rows are one long one."""
    flat = values.reshape(-1)
    for part in flat.split(CHUNK_VALUES):
        _require_fits(part, tensor.name, tensor.kind)
        yield memoryview(_stored(part, tensor.kind)).cast("B")


def _stored(part: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    if kind == GGMLQuantizationType.F32:
        return part.float().numpy()
    if kind == GGMLQuantizationType.F16:
        return part.half().numpy()
    if kind == GGMLQuantizationType.BF16:
        return part.bfloat16().view(torch.int16).numpy()
    return gguf.quantize(part.float().numpy().reshape(1, -1), kind)


def _require_fits(part: Tensor, name: str, kind: GGMLQuantizationType) -> None:
    least, most = torch.aminmax(part)
    if not (least.isfinite() and most.isfinite()):
        raise ExportError(f"{name}: has values that are not finite; this adapter or base is damaged, nothing was written")
    largest = max(-least.item(), most.item())
    if kind not in WIDE and largest > LARGEST:
        raise ExportError(
            f"{name}: values up to {largest:.4g} do not fit {kind.name.lower()} (largest {LARGEST:.4g}); nothing was "
            "written. Use --gguf bf16"
        )
