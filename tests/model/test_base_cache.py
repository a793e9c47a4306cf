"""A base from the cache is the base from its files, bit for bit, and a base of anything else is not taken for it."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from qlite.memory.ledger import Ledger
from qlite.model import base_cache
from qlite.model.load import Base
from qlite.offload import is_host
from qlite.recipe.schema import Memory
from tests.families import FAMILIES, saved_folder
from tests.model.test_families import CPU, logits_of, quiet

STORAGES = {
    "4 bit": {"bits": 4},
    "4 bit, one level": {"bits": 4, "double_quant": False, "quant_type": "fp4", "block_size": 32},
    "8 bit": {"bits": 8},
    "vocabulary in 8 bit": {"bits": 16, "embedding_bits": 8, "head_bits": 8},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder for each test."""
    monkeypatch.setattr(base_cache, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "bases"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("families")
    return {name: saved_folder(tmp, family) for name, family in FAMILIES.items()}


def load(folder: Path, memory: Memory | None = None, **keys: object) -> nn.Module:
    return Base(**{"model": str(folder), "dtype": "float32", **keys}).load(CPU, quiet, memory).model


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def shared_names(model: nn.Module) -> set[frozenset[str]]:
    """Return which names are one tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors_of(model).items():
        names.setdefault(id(tensor), []).append(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


@pytest.fixture
def no_files(monkeypatch):
    """Fail where a base is quantised."""
    monkeypatch.setattr("qlite.model.load.fill", lambda *_: pytest.fail("quantised anew"))


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    assert tensors_of(found).keys() == tensors_of(expected).keys()
    for name, tensor in tensors_of(expected).items():
        other = tensors_of(found)[name]
        assert (type(other), other.dtype, other.requires_grad) == (type(tensor), tensor.dtype, False), name
        assert torch.equal(other, tensor), name
    assert shared_names(found) == shared_names(expected)
    assert torch.equal(logits_of(found), logits_of(expected))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_base_from_the_cache_is_the_one_without_bit_for_bit_and_the_second_load_quantises_nothing(name, storage, folders, request):
    keys = STORAGES[storage]
    quantised = load(folders[name], cache=False, **keys)
    assert_same(load(folders[name], **keys), quantised)
    request.getfixturevalue("no_files")
    assert_same(load(folders[name], **keys), quantised)


def test_what_memory_wants_on_the_host_goes_there(folders, request):
    first = load(folders["llama"], Memory(embedding="host", base="host"))
    request.getfixturevalue("no_files")
    second = load(folders["llama"], Memory(embedding="host", base="host"))
    assert_same(second, first)
    hosted = {name for name, tensor in tensors_of(first).items() if is_host(tensor)}
    assert hosted == {name for name, tensor in tensors_of(second).items() if is_host(tensor)}
    assert len(hosted) > 10


@pytest.mark.parametrize(
    "keys", [{"bits": 8}, {"block_size": 128}, {"quant_type": "fp4"}, {"double_quant": False}, {"head_bits": 8}, {"dtype": "bfloat16"}]
)
def test_another_storage_is_another_base(keys, folders, cache):
    load(folders["llama"])
    load(folders["llama"], **keys)
    assert len(list(cache.iterdir())) == 2


def test_what_decides_no_bit_changes_no_place(folders, cache):
    load(folders["llama"])
    load(folders["llama"], fused=False, attention="eager")
    assert len(list(cache.iterdir())) == 1


def test_a_file_written_anew_is_read_anew(tmp_path):
    folder = saved_folder(tmp_path, FAMILIES["llama"])
    load(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4:] = b"\0\0\0\x41"  # 8.0
    weights.write_bytes(content)
    assert_same(load(folder), load(folder, cache=False))


def test_a_config_changed_beside_the_weights_is_read_anew(tmp_path, cache):
    folder = saved_folder(tmp_path, FAMILIES["llama"])
    load(folder)
    os.utime(folder / "config.json", (1, 1))
    load(folder)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("harm", ["cut", "without names", "another model's", "all ones", "an absurd length", "one bit", "a lost page"])
def test_a_damaged_cache_is_made_anew(harm, folders, cache):
    quantised = load(folders["llama"], cache=False)
    load(folders["llama"])
    (place,) = cache.iterdir()
    whole = (place / base_cache.TENSORS).read_bytes()
    if harm == "cut":
        (place / base_cache.TENSORS).write_bytes(whole[: len(whole) // 2])
    elif harm == "all ones":
        (place / base_cache.TENSORS).write_bytes(b"\xff" * len(whole))
    elif harm == "an absurd length":
        (place / base_cache.TENSORS).write_bytes((2**50).to_bytes(8, "little") + whole[8:])
    elif harm == "one bit":
        (place / base_cache.TENSORS).write_bytes(whole[:-3001] + bytes([whole[-3001] ^ 16]) + whole[-3000:])
    elif harm == "a lost page":
        (place / base_cache.TENSORS).write_bytes(whole[:-5000] + bytes(4096) + whole[-904:])
    elif harm == "without names":
        (place / base_cache.NAMES).write_text("{}")
    else:
        load(folders["qwen2"])
        (other,) = set(cache.iterdir()) - {place}
        (place / base_cache.TENSORS).write_bytes((other / base_cache.TENSORS).read_bytes())
    assert_same(load(folders["llama"]), quantised)


def test_a_base_lies_in_the_files_own_pages_and_what_is_written_into_it_stays_in_this_process(folders, cache):
    first, second = load(folders["llama"]), load(folders["llama"])
    (place,) = cache.iterdir()
    whole = (place / base_cache.TENSORS).read_bytes()
    for model in (first, second):
        begins = [tensor.data_ptr() for tensor in tensors_of(model).values() if tensor.nbytes > 4096]
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(base_cache.TENSORS)]
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
        assert begins
        assert all(any(start <= begin < end for start, end in spans) for begin in begins)
    embedding = first.get_input_embeddings().weight
    with torch.no_grad():
        embedding.add_(1)
    assert (place / base_cache.TENSORS).read_bytes() == whole
    assert_same(second, load(folders["llama"], cache=False))
    # A base that nobody needs any more may be dropped while it is trained on.
    base_cache.drop_oldest(cache, 0, keep=cache / "none")
    assert not list(cache.iterdir())
    assert_same(second, load(folders["llama"], cache=False))


def test_a_first_load_holds_no_more_than_one_without_the_cache(folders):
    def peak(**keys: object) -> int:
        with (ledger := Ledger()), ledger.phase("load"):
            model = load(folders["llama"], **keys)
        held = {id(tensor): tensor.nbytes for tensor in tensors_of(model).values()}
        (moment,) = ledger.moments.values()
        assert moment.bytes >= sum(held.values())
        return moment.bytes

    assert peak() == peak(cache=False)


def test_a_base_that_is_gone_before_it_is_read_back_is_quantised_again(folders, cache, monkeypatch):
    def lost(mine: base_cache.BaseCache, model: nn.Module) -> bool:
        kept = write(mine, model)
        (mine._folder / base_cache.TENSORS).write_bytes(b"")
        return kept

    write = base_cache.BaseCache.write
    monkeypatch.setattr(base_cache.BaseCache, "write", lost)
    assert_same(load(folders["llama"]), load(folders["llama"], cache=False))


@pytest.mark.parametrize("keys", [{"cache": False}, {"bits": 16}])
def test_nothing_is_written_where_nothing_shall_be_or_need_be(keys, folders, cache):
    load(folders["llama"], **keys)
    assert not cache.exists()


def test_a_disk_that_is_nearly_full_or_read_only_stops_no_run(folders, cache, monkeypatch):
    monkeypatch.setattr(base_cache, "free_disk", lambda _: 1000)
    load(folders["llama"])
    assert not cache.exists()
    monkeypatch.setattr(base_cache, "free_disk", lambda _: 1 << 40)
    monkeypatch.setattr(base_cache, "write_tensors", _full)
    load(folders["llama"])
    assert not list(cache.iterdir())


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_bases_used_longest_ago_go_first(folders, cache, monkeypatch):
    load(folders["llama"])
    (one,) = cache.iterdir()
    load(folders["qwen3"])
    os.utime(one / "manifest.json", (1, 1))
    monkeypatch.setattr(base_cache, "CACHE_BYTES", 1)
    load(folders["mistral"])
    assert len(list(cache.iterdir())) == 1
    assert not one.exists()
