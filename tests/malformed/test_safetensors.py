"""Safetensors files that break the format's rules, or keep them and hold what no model is: as base, as adapter, as checkpoint.

The files are made from the rules of github.com/huggingface/safetensors, README, "Format": eight bytes of length N, N bytes of JSON
that begin with "{", then the tensors without a gap. Some of what is tried here the library itself takes.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qlite.errors import QliteError
from qlite.files import new_folder
from qlite.formats.foreign import read_foreign_adapter
from qlite.formats.foreign_fit import put_foreign_adapter
from qlite.formats.peft import WEIGHTS, adapter_tensors, copy_adapter, read_tensors, write_adapter
from qlite.methods.lora import LoRA
from qlite.model.checkpoint import open_checkpoint
from qlite.model.load import Base
from qlite.model.source import ModelFiles
from qlite.training.run_folder import RunFolder
from qlite.training.state import TrainState
from tests.malformed import SECONDS, Case, at_most, count_refused, silent
from tests.tiny import tiny_llama
from tests.tiny_run import save_tiny_base

METHOD = LoRA(rank=4, alpha=8.0, targets=("q_proj", "down_proj"))
Change = Callable[[dict, bytes], bytes]
"""Returns a file's content, made of a good one's table and data."""


def whole(table: object, data: bytes) -> bytes:
    """Return ``table`` and ``data`` as a file."""
    return with_header(table if isinstance(table, bytes) else json.dumps(table).encode(), data)


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def first(table: dict) -> str:
    """Return the name of the first tensor in ``table``."""
    return next(name for name in table if name != "__metadata__")


def entry(**changes: object) -> Change:
    """Return a change of the first tensor's entry; None takes a key out."""

    def change(table: dict, data: bytes) -> bytes:
        name = first(table)
        new = {key: value for key, value in {**table[name], **changes}.items() if value is not None}
        return whole({**table, name: new}, data)

    return change


def shifted(by: int) -> Change:
    """Return a change that moves all tensors but the first so many bytes on."""

    def change(table: dict, data: bytes) -> bytes:
        moved = {
            name: {**each, "data_offsets": [offset + by for offset in each["data_offsets"]]}
            for name, each in table.items()
            if name not in ("__metadata__", first(table))
        }
        return whole({**table, **moved}, data + bytes(max(by, 0)))

    return change


def twice(change_of_second: Callable[[dict], dict]) -> Change:
    """Return a change that names the first tensor a second time."""

    def change(table: dict, data: bytes) -> bytes:
        name = first(table)
        second = f"{json.dumps(name)}: {json.dumps(change_of_second(table[name]))}"
        return whole(f"{json.dumps(table)[:-1]}, {second}}}".encode(), data)

    return change


def renamed(name: str) -> Change:
    return lambda table, data: whole({name if key == first(table) else key: each for key, each in table.items()}, data)


def filled(value: float) -> Change:
    """Return a change that writes ``value`` over the first number of the first tensor, which is float32."""

    def change(table: dict, data: bytes) -> bytes:
        start = table[first(table)]["data_offsets"][0]
        number = bytes(torch.tensor([value]).view(torch.uint8).tolist())
        return whole(table, data[:start] + number + data[start + 4 :])

    return change


def retyped(dtype: str, size: int) -> Change:
    """Return a change that stores the first tensor, of which each number has 4 bytes, as ``dtype`` of ``size`` bytes each."""

    def change(table: dict, data: bytes) -> bytes:
        rows, *columns = table[first(table)]["shape"]
        return entry(dtype=dtype, shape=[rows * 4 // size, *columns])(table, data)

    return change


def cut(start: int, stop: int | None) -> Change:
    return lambda table, data: whole(table, data)[start:stop]


# What the library refuses.
BROKEN: dict[str, Change] = {
    "no byte": cut(0, 0),
    "seven bytes": cut(0, 7),
    "the length alone": cut(0, 8),
    "half of the table": cut(0, 60),
    "the last byte missing": cut(0, -1),
    "half of the data missing": lambda table, data: whole(table, data[: len(data) // 2]),
    "one byte too many": lambda table, data: whole(table, data) + b"\0",
    "another file behind it": lambda table, data: whole(table, data) + b"PK\x03\x04" + bytes(40),
    "a table of no length": lambda table, data: with_header(b"", data, 0),
    "a table longer than the file": lambda table, data: with_header(json.dumps(table).encode(), data, 10**6 + len(data)),
    "a table of 100,000,001 bytes": lambda table, data: with_header(b"{}", b"", 100_000_001),
    "a table of 2^63 bytes": lambda table, data: with_header(b"{}", data, 2**63),
    "a table of 2^64 - 1 bytes": lambda table, data: with_header(b"{}", data, 2**64 - 1),
    "a length that ends inside the table": lambda table, data: with_header(json.dumps(table).encode(), data, 40),
    "a length in the other byte order": lambda table, data: (n := json.dumps(table).encode()) and len(n).to_bytes(8, "big") + n + data,
    "a table that is not UTF-8": lambda table, data: whole(b'{"\xff": 1}', data),
    "a table in UTF-16": lambda table, data: whole(json.dumps(table).encode("utf-16"), data),
    "a table behind a byte order mark": lambda table, data: whole(b"\xef\xbb\xbf" + json.dumps(table).encode(), data),
    "a table that is not JSON": lambda table, data: whole(b"{a: 1}", data),
    "a table that is a list": lambda table, data: whole([table], data),
    "a table that is a text": lambda table, data: whole("table", data),
    "a table that is a number": lambda table, data: whole(7, data),
    "a table that is null": lambda table, data: whole(None, data),
    "a table with NaN": lambda table, data: whole(b'{"a": NaN}', data),
    "a table 100,000 deep": lambda table, data: whole(b'{"a": ' * 100_000, data),
    "a table cut off": lambda table, data: whole(json.dumps(table).encode()[:-5], data),
    "a table with a comma too many": lambda table, data: whole(json.dumps(table).encode()[:-1] + b",}", data),
    "an entry that is a number": lambda table, data: whole({**table, first(table): 3}, data),
    "an entry that is a list": lambda table, data: whole({**table, first(table): []}, data),
    "an entry without dtype": entry(dtype=None),
    "an entry without shape": entry(shape=None),
    "an entry without offsets": entry(data_offsets=None),
    "an unknown dtype": entry(dtype="F33"),
    "a dtype in small letters": entry(dtype="f32"),
    "a dtype that is a number": entry(dtype=32),
    "a shape that is a number": entry(shape=64),
    "a negative shape": entry(shape=[-64, -64]),
    "a shape in fractions": entry(shape=[64.5, 2]),
    "a shape in texts": entry(shape=["64", "64"]),
    "a shape whose product overflows": entry(shape=[2**40, 2**40]),
    "a shape beyond 64 bits": entry(shape=[2**64]),
    "a shape larger than the data": entry(shape=[10**6, 10**6]),
    "a shape smaller than the data": entry(shape=[1]),
    "a shape without a number": entry(shape=[]),
    "offsets that go backwards": entry(data_offsets=[8, 0]),
    "negative offsets": entry(data_offsets=[-8, 8]),
    "one offset": entry(data_offsets=[0]),
    "three offsets": entry(data_offsets=[0, 4, 8]),
    "offsets beyond the file": entry(data_offsets=[10**9, 10**9 + 4]),
    "offsets that overflow": entry(data_offsets=[2**64 - 4, 2**64]),
    "a hole between tensors": shifted(4),
    "tensors that overlap": shifted(-4),
    "a hole before the first": lambda table, data: whole({n: e for n, e in table.items() if n != first(table)}, data),
    "metadata that is no text": lambda table, data: whole({**table, "__metadata__": {"a": 1}}, data),
    "metadata that is a list": lambda table, data: whole({**table, "__metadata__": ["a"]}, data),
    "a dtype twice as wide": entry(dtype="F64"),
    "half a byte for each number": entry(dtype="F4"),
    "one tensor named twice, elsewhere": twice(lambda each: {**each, "data_offsets": [0, 4]}),
    "a zip archive": lambda table, data: b"PK\x03\x04" + bytes(200),
    "a pickle": lambda table, data: b"\x80\x02}q\x00." + bytes(200),
    "a pointer instead of the file": lambda table, data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n",
    "a page instead of the file": lambda table, data: b"<!DOCTYPE html><html><body>404</body></html>",
    "a table and nothing in it": lambda table, data: whole({}, b""),
}
# What the library takes.
TAKEN: dict[str, Change] = {
    "one tensor named twice": twice(lambda each: each),
    "a table behind blanks": lambda table, data: whole(b"  " + json.dumps(table).encode(), data),
    "NaN": filled(float("nan")),
    "infinity": filled(float("inf")),
    "minus infinity": filled(float("-inf")),
    "a name that leads out of the folder": renamed("../../etc/passwd"),
    "a name with escape codes": renamed("\x1b[2J\x1b]0;owned\x07"),
    "a name that runs from right to left": renamed("\u202eweight"),
    "a name of 10,000 characters": renamed("x" * 10_000),
    "a name of a line break": renamed("\n"),
    "no name": renamed(""),
    "a name with NUL": renamed("a\0b"),
    "a tensor too few": lambda table, data: last_left_out(table, data),
    "a tensor too many": lambda table, data: whole(
        {**table, "more": {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}}, data + bytes(4)
    ),
    "an empty tensor": lambda table, data: whole({**table, "none": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, data),
    "one dimension": lambda table, data: reshaped(table, data, lambda shape: [torch.Size(shape).numel()]),
    "three dimensions": lambda table, data: reshaped(table, data, lambda shape: [1, *shape]),
    "rows and columns changed over": lambda table, data: reshaped(table, data, lambda shape: [*shape[:-2], shape[-1] * 2, shape[-2] // 2]),
    "8-bit floats": retyped("F8_E4M3", 1),
    "8-bit floats of another sort": retyped("F8_E5M2", 1),
    "complex numbers": retyped("C64", 8),
}


def last_left_out(table: dict, data: bytes) -> bytes:
    name = max((name for name in table if name != "__metadata__"), key=lambda name: table[name]["data_offsets"])
    return whole({key: each for key, each in table.items() if key != name}, data[: table[name]["data_offsets"][0]])


def reshaped(table: dict, data: bytes, shape: Callable[[list[int]], list[int]]) -> bytes:
    name = next(name for name, each in table.items() if name != "__metadata__" and len(each["shape"]) == 2)
    return whole({**table, name: {**table[name], "shape": shape(table[name]["shape"])}}, data)


def taken_apart(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


# The three roles that such a file has


def as_base(good: Path, spoil: Callable[[Path], object], folder: Path) -> Callable[[], object]:
    model = Path(shutil.copytree(good / "base", folder / "base"))
    spoil(model / "model.safetensors")
    base = Base(model=str(model), bits=16, dtype="float32", fused=False)
    return partial(base.load, torch.device("cpu"), silent)


def as_adapter(good: Path, spoil: Callable[[Path], object], folder: Path) -> Callable[[], object]:
    adapter = Path(shutil.copytree(good / "adapter", folder / "adapter"))
    spoil(adapter / WEIGHTS)
    return lambda: put_foreign_adapter(read_foreign_adapter(adapter), tiny_llama(), adapter)


def as_checkpoint(good: Path, spoil: Callable[[Path], object], folder: Path) -> Callable[[], object]:
    """The best adapter so far, which is not the one that the manifest beside it was made of."""
    shutil.copytree(good / "best", folder / "run" / "best" / "step-00000003")
    spoil(folder / "run" / "best" / "step-00000003" / WEIGHTS)
    return partial(RunFolder(folder / "run").load_best, TrainState(best_step=3), nn.Module())


def spoilt_by(change: Change) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(*taken_apart(path)))


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: (path.unlink(), make(path))


PLACES = {
    "a pipe": replaced_by(os.mkfifo),
    "a folder": replaced_by(Path.mkdir),
    "a device without an end": replaced_by(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": replaced_by(lambda path: path.symlink_to(path.name)),
    "a link to nothing": replaced_by(lambda path: path.symlink_to("gone")),
    "no file": Path.unlink,
}
ROLES = {
    "base": (as_base, r"model\.safetensors|its files do not fit its config\.json|num_hidden_layers is 2|holds no \*\.safetensors"),
    "adapter": (as_adapter, r"/adapter/adapter_model\.safetensors: |/adapter: the adapter does not fit this base: "),
    "checkpoint": (as_checkpoint, r'step-00000003" is damaged or missing; take output\.adapter = "last"'),
}


def make_good(folder: Path) -> Path:
    """Write a base, an adapter for it and a run's best adapter into ``folder``."""
    save_tiny_base(folder / "base")
    model = tiny_llama()
    METHOD.attach(model)
    for layer in model.model.layers:
        layer.mlp.down_proj.lora_B.weight.data.fill_(0.125)  # as if trained
    write_adapter(folder / "adapter", model, METHOD, "org/base")
    with new_folder(folder / "best") as best:
        shutil.copy(folder / "adapter" / WEIGHTS, best / WEIGHTS)
    return folder


def cases(good: Path = Path()) -> list[Case]:
    spoils = {name: spoilt_by(change) for name, change in {**BROKEN, **TAKEN}.items()} | PLACES
    return [
        Case(f"{role}: {name}", partial(give, good, spoil), pattern=said)
        for role, (give, said) in ROLES.items()
        for name, spoil in spoils.items()
    ]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return make_good(tmp_path_factory.mktemp("good"))


def test_the_good_files_are_read(good):
    for role in (as_base, as_adapter):
        role(good, lambda path: None, good / f"a copy for {role.__name__}")()


def test_every_malformed_file_is_refused_as_base_as_adapter_and_as_checkpoint(good, tmp_path, record_property):
    assert (len(BROKEN), len(TAKEN), len(PLACES)) == (63, 21, 6)
    found = cases(good)
    assert len(found) == 3 * 90
    count_refused("safetensors", found, tmp_path, record_property)


def test_what_the_library_takes_is_what_qlite_has_to_see(good, tmp_path):
    taken = []
    for name, change in TAKEN.items():
        path = tmp_path / "a.safetensors"
        path.write_bytes(change(*taken_apart(good / "adapter" / WEIGHTS)))
        load_file(path)
        taken.append(name)
    assert taken == list(TAKEN)


# Chance


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Return ``content`` with a few bytes changed, left out, put in or moved, most of them in the table."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(len(content), 2000) if draw.random() < 0.8 else len(content)) if content else 0
        length = draw.choice([0, 1, 1, 2, 8, 100])
        new = draw.choice([b"", draw.randbytes(1), draw.randbytes(length), content[at : at + length], b"9" * length, b"{", b'"', b"[]"])
        content = content[:at] + new + content[at + length :]
    return content


def try_mutations(count: int, good: Path, folder: Path) -> dict[str, int]:
    """Read ``count`` mutations of a base and of an adapter; return how many were refused and read. Anything else fails."""
    draw, found = random.Random(0), {"refused": 0, "read": 0}
    model = tiny_llama()
    METHOD.attach(model)
    base = Path(shutil.copytree(good / "base", folder / "base"))
    originals = {path: path.read_bytes() for path in (good / "base/model.safetensors", good / "adapter" / WEIGHTS)}
    for number in range(count):
        is_base = number % 2 == 0
        path = base / "model.safetensors" if is_base else folder / WEIGHTS
        path.unlink(missing_ok=True)  # what was mapped before stays as it was
        path.write_bytes(mutated(originals[good / "base/model.safetensors" if is_base else good / "adapter" / WEIGHTS], draw))
        try:
            with at_most(SECONDS):
                if is_base:
                    checkpoint = open_checkpoint(ModelFiles(base, None, "base"))
                    assert all(checkpoint.read(name).isfinite().all() for name in checkpoint.order())
                else:
                    copy_adapter(read_tensors(folder), model, folder)
                    assert all(tensor.isfinite().all() for tensor in adapter_tensors(model).values())
            found["read"] += 1
        except QliteError as error:
            found["refused"] += str(path.parent) in str(error)
    assert sum(found.values()) == count
    return found


def test_mutations_end_in_an_error_or_in_finite_tensors_and_never_otherwise(good, tmp_path, record_property):
    found = try_mutations(300, good, tmp_path)
    assert found["refused"] > 200
    record_property("figure", f"mutated safetensors: {found['refused']} refused, {found['read']} read, 0 crashes, 0 hangs of 300")


@pytest.mark.nightly
def test_ten_thousand_mutations_end_in_an_error_or_in_finite_tensors(good, tmp_path, record_property):
    found = try_mutations(10_000, good, tmp_path)
    record_property("figure", f"mutated safetensors: {found['refused']} refused, {found['read']} read, 0 crashes, 0 hangs of 10,000")
