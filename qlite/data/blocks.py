"""A text file in blocks of whole lines, so that memory stays flat; what is not UTF-8 text is refused with its byte and line."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from qlite.errors import DataError, shown
from qlite.given import sort_of
from qlite.units import MIB, format_bytes

BLOCK_BYTES = MIB
LONGEST_LINE_BYTES = 64 * MIB
HEAD_BYTES = 512
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Told = Callable[[int], None]
"""Is told the bytes of a source that have been read so far."""

# First bytes of a file -> what it is, and what to do with it.
MAGIC = (
    (b"\x1f\x8b", "gzip-compressed", "unpack it with gunzip"),
    (b"BZh", "bzip2-compressed", "unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "xz-compressed", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"PAR1", "Parquet", "give it the ending .parquet"),
    (b"ARROW1", "an Arrow file", "write it as Parquet"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "load it with datasets and write it with to_parquet"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save it as CSV, UTF-8"),
    (b"%PDF", "a PDF document", "extract its text"),
    (b"SQLite format 3\0", "an SQLite data base", "write its rows as .jsonl or .csv"),
    (b"\x89HDF", "HDF5", "write its rows as .jsonl or .parquet"),
    (b"\xff\xfe\0\0", "UTF-32 text", "save it as UTF-8: iconv -f utf-32 -t utf-8"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8: iconv -f utf-16 -t utf-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8: iconv -f utf-16 -t utf-8"),
)


@dataclass(frozen=True)
class DataFile:
    """A file of a source."""

    path: Path
    name: str
    """As messages show it: relative to the folder or pattern that was given."""


def text_blocks(file: DataFile, told: Told, any_line: bool = False) -> Iterator[str]:
    """Yield the text of ``file`` in blocks of about 1 MiB, each but the last ending with a line end; no byte order mark.

    A line longer than a block makes its block longer. ``told`` hears of each block once it has been used.

    Raises:
        DataError: the file cannot be read, is no UTF-8 text, holds NUL bytes, or a line of it is longer than 64 MiB (but for ``any_line``).
    """
    with opened(file) as stream:
        done = 0
        for block in _whole_lines(stream, file, any_line):
            yield _decoded(block, done, file)
            done += len(block)
            told(done)


@contextmanager
def opened(file: DataFile) -> Iterator[BinaryIO]:
    """Open ``file`` for reading bytes.

    Raises:
        DataError: it cannot be read, now or later, or is no regular file: opening a pipe would wait for ever, /dev/zero never ends.
    """
    try:
        mode = file.path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise DataError(f"{file.name}: is {sort_of(mode)}, and only regular files are read; write its content to a file")
        with file.path.open("rb") as stream:
            yield stream
    except OSError as error:
        target = f", which is a link to {shown(os.readlink(file.path))}" if file.path.is_symlink() else ""
        raise DataError(f"{file.name}: cannot read the file{target} ({error.strerror or shown(str(error))})") from error


def what_it_is(head: bytes) -> str | None:
    """Return what a file that begins with the bytes ``head`` is, and what to do with it; None if that is not known."""
    if head.startswith(b"PK\x03\x04") and (b"[Content_Types].xml" in head or b"xl/" in head):
        return "is an Excel workbook or other Office document; save it as CSV, UTF-8"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it"
    for magic, sort, fix in MAGIC:
        if head.startswith(magic):
            return f"is {sort}; {fix}"
    # ASCII in UTF-16 has a NUL in every other byte.
    odd, even = head[1::2], head[0::2]
    if len(head) > 1 and (odd.count(0) > 0.9 * len(odd) or even.count(0) > 0.9 * len(even)):
        order = "le" if odd.count(0) > even.count(0) else "be"
        return f"is UTF-16 text; save it as UTF-8: iconv -f utf-16{order} -t utf-8"
    return None


def _whole_lines(stream: BinaryIO, file: DataFile, any_line: bool) -> Iterator[bytes]:
    """Yield all bytes of ``stream``, cut only at line ends."""
    held, held_bytes, done = [], 0, 0
    while block := stream.read(BLOCK_BYTES):
        cut = block.rfind(b"\n") + 1
        if cut:
            whole = b"".join((*held, block[:cut]))
            yield whole
            done += len(whole)
            held, held_bytes, block = [], 0, block[cut:]
        held.append(block)
        held_bytes += len(block)
        if held_bytes > LONGEST_LINE_BYTES and not any_line:
            long = f"is longer than {format_bytes(LONGEST_LINE_BYTES)}"
            raise DataError(f"{_place(file, done)}: this line {long}; is it one row a line, and are line ends \\n?")
    if held_bytes:
        yield b"".join(held)


def _decoded(block: bytes, done: int, file: DataFile) -> str:
    """Return ``block``, which begins at byte ``done`` of ``file``, as text."""
    nul = block.find(b"\0")
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(file) or _not_utf8(file, done + error.start, error) from error
    if nul >= 0:
        raise _not_text(file) or DataError(
            f"{_place(file, done + nul)}: a NUL byte, which no text holds: the file is damaged or no text; write it anew"
        )
    return text if done else text.removeprefix("\ufeff")


def _not_text(file: DataFile) -> DataError | None:
    with opened(file) as stream:
        what = what_it_is(stream.read(HEAD_BYTES))
    return DataError(f"{file.name}: {what}") if what else None


def _not_utf8(file: DataFile, at: int, error: UnicodeDecodeError) -> DataError:
    if error.reason == "unexpected end of data":
        return DataError(f"{_place(file, at)}: the file ends inside a character: it was cut off; get the whole file, or remove its end")
    value = error.object[error.start]
    return DataError(
        f"{_place(file, at)}: not UTF-8 (0x{value:02X}); convert the file, for example from Latin-1: iconv -f latin1 -t utf-8 FILE > NEW"
    )


def _place(file: DataFile, at: int) -> str:
    """Return where byte ``at`` is, for a message. The file is read again for it: lines are not counted while all is well."""
    with opened(file) as stream:
        lines, left = 0, at
        while left and (block := stream.read(min(BLOCK_BYTES, left))):
            lines += block.count(b"\n")
            left -= len(block)
    return f"{file.name} line {lines + 1}, byte {at}"
