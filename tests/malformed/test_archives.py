"""Archives in the place of what they hold: refused unopened, whatever they are called, and nothing is ever unpacked."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from qlite.data.template import find_template
from qlite.formats.peft import CONFIG, WEIGHTS
from qlite.model.load import Base
from qlite.recipe.read import read_recipe
from tests.data.data_files import GOOD, lines_of, read
from tests.malformed import Case, count_refused, silent
from tests.malformed.test_adapters import put_on
from tests.malformed.test_model_folders import given, written
from tests.malformed.test_safetensors import make_good
from tests.tiny_tokenizer import tiny_tokenizer

CONTENT = lines_of(GOOD).encode()


def zipped() -> bytes:
    """Return a zip archive with a member that would be unpacked above its folder, and one of 100 MB in 100 kB."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../rows.jsonl", CONTENT)
        archive.writestr("bomb.jsonl", bytes(10**8))
    return content.getvalue()


def tarred(mode: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        member = tarfile.TarInfo("../../rows.jsonl")
        member.size = len(CONTENT)
        archive.addfile(member, io.BytesIO(CONTENT))
    return content.getvalue()


# Ending -> content, what is said of it as data.
ARCHIVES = {
    ".zip": (zipped(), "is a zip archive; unpack it"),
    ".whl": (zipped(), "is a zip archive; unpack it"),
    ".tar": (tarred("w"), "is a tar archive; unpack it"),
    ".tar.gz": (tarred("w:gz"), "is gzip-compressed; unpack it"),
    ".tgz": (tarred("w:gz"), "is gzip-compressed; unpack it"),
    ".tar.bz2": (tarred("w:bz2"), "is bzip2-compressed; unpack it"),
    ".tar.xz": (tarred("w:xz"), "is xz-compressed; unpack it"),
    ".gz": (gzip.compress(CONTENT), "is gzip-compressed; unpack it"),
    ".7z": (b"7z\xbc\xaf\x27\x1c" + bytes(40), "is a 7z archive; unpack it"),
    ".zst": (b"\x28\xb5\x2f\xfd" + bytes(40), "is zstd-compressed; unpack it"),
}
DATA_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md", ".parquet")
AS_MODEL = r"is neither a folder nor a \.gguf file"


def as_data(name: str, content: bytes, folder: Path) -> Callable[[], object]:
    (folder / name).write_bytes(content)
    return partial(read, folder / name)


def as_base(name: str, content: bytes, folder: Path) -> Callable[[], object]:
    (folder / name).write_bytes(content)
    return lambda: Base(model=str(folder / name)).load(torch.device("cpu"), silent)


def as_adapter(content: bytes, folder: Path) -> Callable[[], object]:
    (folder / "adapter.zip").write_bytes(content)
    return put_on(folder / "adapter.zip")


def as_adapter_part(good: Path, name: str, content: bytes, folder: Path) -> Callable[[], object]:
    for each in (CONFIG, WEIGHTS):
        (folder / each).write_bytes(content if each == name else (good / "adapter" / each).read_bytes())
    return put_on(folder)


def as_recipe(content: bytes, folder: Path) -> Callable[[], object]:
    (folder / "my.toml").write_bytes(content)
    return partial(read_recipe, folder / "my.toml")


def as_template(content: bytes, folder: Path) -> Callable[[], object]:
    (folder / "my.jinja").write_bytes(content)
    return partial(find_template, str(folder / "my.jinja"), tiny_tokenizer())


def cases(good: Path = Path()) -> list[Case]:
    zip_bytes, gzip_bytes = ARCHIVES[".zip"][0], ARCHIVES[".gz"][0]
    own = [Case(f"data a{end}", partial(as_data, f"a{end}", content), (f"a{end}: ", said)) for end, (content, said) in ARCHIVES.items()]
    base = [Case(f"base a{end}", partial(as_base, f"a{end}", content), pattern=AS_MODEL) for end, (content, _) in ARCHIVES.items()]
    renamed = [
        Case(f"{what} as a{end}", partial(as_data, f"a{end}", content), (f"a{end}: ", ARCHIVES[what][1]))
        for what, content in ((".zip", zip_bytes), (".tar", ARCHIVES[".tar"][0]), (".gz", gzip_bytes))
        for end in DATA_ENDINGS
    ]
    in_folders = [
        Case(f"a zip as {name}", partial(given, good, written(name, zip_bytes)), (said,))
        for name, said in {
            "model.safetensors": "model.safetensors: is damaged or cut short",
            "config.json": "config.json: is not JSON",
            "tokenizer.json": "has no tokenizer that can be read",
            "tokenizer_config.json": "tokenizer_config.json: is not JSON",
            "generation_config.json": "generation_config.json: is not JSON",
            "chat_template.jinja": "has no tokenizer that can be read",
        }.items()
    ]
    others = [
        Case("a zip as a GGUF file", partial(as_base, "a.gguf", zip_bytes), ("a.gguf: is not a GGUF file (it starts with b'PK",)),
        Case("a gzipped GGUF file", partial(as_base, "a.gguf", gzip_bytes), ("a.gguf: is not a GGUF file",)),
        Case("PyTorch's own zip", partial(as_base, "model.pt", zip_bytes), ("is a pickle, and pickle weights are never read",)),
        Case("a zip as an adapter", partial(as_adapter, zip_bytes), ("cannot be read (Not a directory)",)),
        Case("a zip as an adapter's weights", partial(as_adapter_part, good, WEIGHTS, zip_bytes), (f"{WEIGHTS}: cannot be read",)),
        Case("a zip as an adapter's config", partial(as_adapter_part, good, CONFIG, zip_bytes), (f"{CONFIG}: not JSON",)),
        Case(
            "a zip as a recipe", partial(as_recipe, zip_bytes), pattern=r"my\.toml: (byte \d+: not UTF-8|cannot read the recipe \(it has)"
        ),
        Case("a gzipped recipe", partial(as_recipe, gzip_bytes), ("my.toml: byte 1: not UTF-8",)),
        Case("a gzipped template", partial(as_template, gzip_bytes), ('my.jinja" byte 1: not UTF-8',)),
    ]
    return [*own, *base, *renamed, *in_folders, *others]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return make_good(tmp_path_factory.mktemp("good"))


def test_every_archive_is_refused_unopened(good, tmp_path, record_property):
    found = cases(good)
    assert len(found) == 10 + 10 + 21 + 6 + 9
    count_refused("archives", found, tmp_path, record_property)
