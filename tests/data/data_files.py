"""Data files for tests: written, read through a source, and refused as a user sees it."""

import io
import json
from pathlib import Path

import pytest

from qlite.data.rows import Row
from qlite.data.sources import Source, read_rows
from qlite.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
GOOD = {"prompt": "a", "completion": "b"}


def read(path: object, **settings: object) -> list[Row]:
    return list(read_rows(Source(path=str(path), **settings), "data.train"))


def refusal(path: object, **settings: object) -> str:
    """Return what ``path`` is refused with: always one printable line that begins with the key."""
    with pytest.raises(DataError) as error:
        read(path, **settings)
    message = str(error.value)
    assert message.isprintable()
    assert message.startswith("data.train: ")
    return message.removeprefix("data.train: ")


def read_or_refusal(path: object) -> list[Row] | str:
    """Return the rows of ``path``, or what it is refused with."""
    try:
        return read(path)
    except DataError:
        return refusal(path)


def written(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines_of(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def parquet_bytes(values: list[dict], **settings: object) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    content = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(values), content, **settings)
    return content.getvalue()


def shared(name: str) -> Path:
    """Return a path in the data that lies beside the repository; skips where it is not there."""
    if not (SHARED / name.split("/")[0]).exists():
        pytest.skip(f"there is no ../shared/data/{name}")
    return SHARED / name
