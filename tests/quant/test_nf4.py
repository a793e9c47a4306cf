"""The compiled quantiser gives bitsandbytes' bits."""

import pytest
import torch

from qlite import compiling
from qlite.memory.ledger import Ledger
from qlite.quant import nf4
from qlite.quant.nf4 import compile_quantiser, quantize_4bit

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of files


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "cache_folder", lambda: folder)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        for dtype in DTYPES:
            compile_quantiser(dtype)
        assert nf4._quick.keys() == set(DTYPES)
        yield
        nf4._quick.clear()


def bitsandbytes(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.bitsandbytes.quantize_4bit(weight, block_size, "nf4", torch.uint8)


def weights() -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    normal = torch.randn(96, 4096, generator=chance)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return {
        "bell-shaped": normal * 0.02,
        "some outliers": normal.where(torch.rand(normal.shape, generator=chance) > 0.01, normal * 1000),
        "zeros": torch.zeros(4, 4096),
        "on the middles of levels": torch.tensor([1.0, *nf4._MIDDLES] * 256),
        "tiny": normal * 1e-38,
        "every finite bfloat16": every[every.isfinite()].repeat(64),
        "a stretch of a larger matrix": normal[:, 64:192],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
@pytest.mark.parametrize("name", weights())
def test_its_bits_are_those_of_bitsandbytes(name, block_size, dtype):
    weight = weights()[name].to(dtype).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    if weight.numel() % block_size:
        weight = weight.flatten()[: weight.numel() // block_size * block_size]
    for found, right in zip(quantize_4bit(weight, block_size, "nf4"), bitsandbytes(weight, block_size), strict=True):
        assert found.dtype == right.dtype
        assert torch.equal(found, right)


def test_what_is_no_whole_number_of_blocks_or_of_another_type_goes_to_bitsandbytes(monkeypatch):
    monkeypatch.setitem(nf4._quick, torch.bfloat16, lambda *_: pytest.fail("asked"))
    for weight in (torch.randn(3, 33).bfloat16(), torch.randn(2, 64).double()):
        assert all(map(torch.equal, quantize_4bit(weight, 64, "nf4"), bitsandbytes(weight, 64)))


def test_without_a_compiler_bitsandbytes_quantises(monkeypatch):
    def none(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(nf4, "compiled", none)
    monkeypatch.setattr(nf4, "_quick", {})
    compile_quantiser(torch.float32)
    assert nf4._quick == {}
    weight = torch.randn(2, 64)
    assert all(map(torch.equal, quantize_4bit(weight, 64, "nf4"), bitsandbytes(weight, 64)))


def test_who_follows_tensors_does_not_see_the_compilers(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(nf4, "_quick", {})
    ledger = Ledger()
    with ledger, ledger.phase("load"):
        compile_quantiser(torch.float32)
    assert torch.float32 in nf4._quick
    assert {peak.bytes for peak in ledger.moments.values()} == {0}
