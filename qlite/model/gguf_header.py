"""A GGUF file's header: its metadata and where each tensor lies, read in milliseconds from a memory map.

The gguf package's own GGUFReader makes a numpy array of every token and merge, which takes seconds for a real vocabulary.
Source: the format's specification, ggml/docs/gguf.md (versions 2 and 3, little-endian).
"""

import mmap
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qlite.errors import ModelError

DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")
# The specification's value types of fixed size, as struct formats.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor's place in the file."""

    name: str
    shape: tuple[int, ...]
    """In torch's order: rows first."""
    kind: GGMLQuantizationType
    offset: int
    """Bytes from the start of the file."""
    nbytes: int

    @property
    def rows(self) -> int:
        """The number of rows that can be read apart: all but the last dimension; every value of an unquantised vector."""
        is_plain_vector = len(self.shape) == 1 and GGML_QUANT_SIZES[self.kind][0] == 1
        return prod(self.shape) if is_plain_vector else prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the tensors' data."""

    metadata: dict[str, object]
    """Arrays of strings (the vocabulary, the merges) are left as their length, an int."""
    tensors: dict[str, StoredTensor]
    """In file order, by GGUF name."""
    data_start: int
    """The header's length in bytes, padding included."""
    places: dict[str, slice] = field(default_factory=dict)
    """Where in the file each metadata value stands, its type in front."""


def read_header(path: Path) -> GgufHeader:
    """Return the header of the GGUF file at ``path``.

    Raises:
        ModelError: it is no GGUF file, of another version or byte order, or cut short.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _parse(_Cursor(content), path)
    except (struct.error, ValueError, OverflowError) as error:  # an unknown tensor kind is a ValueError; so is an empty file
        raise ModelError(f"{path}: is not a GGUF file that can be read ({error}); download it again") from error


def raw_values(path: Path, header: GgufHeader) -> dict[str, bytes]:
    """Return every metadata value of the file at ``path`` as the bytes that it is there, its type in front."""
    with path.open("rb") as stream:
        content = stream.read(header.data_start)
    return {key: content[place] for key, place in header.places.items()}


class _Cursor:
    """A position in the file that moves on with what is read; reading past the end raises struct.error."""

    def __init__(self, content: mmap.mmap):
        self.content = content
        self.position = 0

    def numbers(self, form: str) -> tuple:
        values = struct.unpack_from("<" + form, self.content, self.position)
        self.position += struct.calcsize("<" + form)
        return values

    def skip_strings(self, count: int) -> None:
        content, position, length_at = self.content, self.position, LENGTH.unpack_from
        for _ in range(count):  # a vocabulary and its merges: nothing here but what it takes
            position += LENGTH.size + length_at(content, position)[0]
        if position > len(content):
            raise struct.error(f"a string runs past the end, to byte {position}")
        self.position = position

    def string(self) -> str:
        start = self.position + LENGTH.size
        self.skip_strings(1)
        return self.content[start : self.position].decode("utf-8")

    def value(self) -> object:
        (kind,) = self.numbers("I")
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        return self.numbers(_scalar(kind))[0]

    def array(self) -> list | int:
        kind, count = self.numbers("IQ")
        if kind != STRING:
            return list(self.numbers(f"{count}{_scalar(kind)}"))
        self.skip_strings(count)
        return count


def _scalar(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"value type {kind} is unknown")
    return SCALARS[kind]


def _parse(cursor: _Cursor, path: Path) -> GgufHeader:
    magic, version = cursor.numbers("4sI")
    if magic != b"GGUF":
        raise ModelError(f"{path}: is not a GGUF file (it starts with {magic!r}); give a .gguf file")
    if version not in (2, 3):
        raise ModelError(f"{path}: is GGUF version {version}; only little-endian versions 2 and 3 are read")
    tensor_count, key_count = cursor.numbers("QQ")
    metadata, values_at = {}, {}
    for _ in range(key_count):
        key = cursor.string()
        start = cursor.position
        metadata[key] = cursor.value()
        values_at[key] = slice(start, cursor.position)
    rows = [_tensor_row(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    places = [_place(name, shape, kind, data_start + offset) for name, shape, kind, offset in rows]
    tensors = {place.name: place for place in sorted(places, key=lambda place: place.offset)}
    _require_complete(tensors, len(cursor.content), path)
    return GgufHeader(metadata, tensors, data_start, values_at)


def _tensor_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    (dimensions,) = cursor.numbers("I")
    sizes = cursor.numbers(f"{dimensions}Q")
    kind, offset = cursor.numbers("IQ")
    return name, tuple(reversed(sizes)), kind, offset


def _place(name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
    stored_as = GGMLQuantizationType(kind)
    values_per_block, bytes_per_block = GGML_QUANT_SIZES[stored_as]
    if shape and shape[-1] % values_per_block != 0:
        raise ValueError(f"{name}: rows of {shape[-1]} values do not fill {stored_as.name}'s blocks of {values_per_block}")
    return StoredTensor(name, shape, stored_as, offset, prod(shape) // values_per_block * bytes_per_block)


def _require_complete(tensors: dict[str, StoredTensor], file_bytes: int, path: Path) -> None:
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=0)
    if end > file_bytes:
        raise ModelError(f"{path}: has {file_bytes} bytes, but its header promises {end}; the download was cut short, take it anew")
