"""The kernels written for cards, without one: what they compute, by Triton's interpreter, and what its compiler makes of them."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qlite.model import elementwise

triton = pytest.importorskip("triton", reason="Triton is not installed (there is none for this machine?)")
GPUTarget = import_module("triton.backends.compiler").GPUTarget
ASTSource = import_module("triton.compiler").ASTSource
card_kernels = import_module("qlite.card_kernels")
CAPABILITIES = {"RTX 30": 86, "RTX 40": 89, "RTX 50": 120}
# In a process of its own: Triton asks when it is imported whether it is to interpret.
INTERPRETER = """
import sys, torch
from qlite import card_kernels
given = torch.load(sys.argv[1])
torch.save([(getattr(card_kernels, name)(*args), args) for name, args in given], sys.argv[2])
"""


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def cases() -> dict[str, tuple[str, Callable, tuple[Tensor, ...]]]:
    """Return kernels, the functions that they stand for and arguments, by what is computed."""
    found, eps = {}, torch.tensor(1e-5)
    for rows, size in [(7, 96), (5, 4096), (300, 128), (1, 576), (33, 64)]:
        x, grad, weight = drawn(rows, size), drawn(size, rows).T.contiguous(), drawn(size)
        found[f"norm {rows} x {size}"] = "norm_rows", elementwise._norm_rows, (x, weight, eps)
        found[f"its gradient {rows} x {size}"] = "norm_rows_backward", elementwise._norm_rows_backward, (grad, x, weight, eps)
    for count in (1, 2048, 5000):
        gate, up, grad = drawn(count), drawn(1, count)[0], drawn(count, 1)[:, 0]
        found[f"SwiGLU {count}"] = "gated", elementwise._gated, (gate, up)
        found[f"its gradient {count}"] = "gated_backward_", elementwise._gated_backward_, (gate, up, grad)
    for rows, heads, size in [(3, 32, 128), (5, 9, 64), (4, 5, 80), (2, 1, 96), (6, 40, 256)]:
        args = drawn(rows, heads, size), drawn(rows, 1, size), drawn(1, rows, size).transpose(0, 1).contiguous()
        found[f"rotary {rows} x {heads} x {size}"] = "turned", elementwise._turned, args
        found[f"and back {rows} x {heads} x {size}"] = "turned_back", elementwise._turned_back, args
    for rows, size in [(5, 300), (2, 4096), (3, 10_001)]:
        logits, targets, sums = 9 * drawn(rows, size), torch.arange(rows) * 60, drawn(rows).abs() + 20
        found[f"losses {rows} x {size}"] = "losses", elementwise._losses, (logits, targets)
        args = logits, targets, sums, torch.tensor(7.0)
        found[f"their gradient {rows} x {size}"] = "turned_into_grad_", elementwise._turned_into_grad_, args
    masked = drawn(2, 9000).masked_fill(torch.arange(9000) < 5000, -torch.inf)
    found["losses, a masked stretch first"] = "losses", elementwise._losses, (masked, torch.tensor([5000, 8999]))
    return found


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, list[Tensor]]:
    """What the kernels made of each case, and of its arguments, by Triton's interpreter."""
    made = run_interpreted([(name, args) for name, _, args in cases().values()], tmp_path_factory.mktemp("interpreted"))
    return {case: [*results_of(result), *args] for case, (result, args) in zip(cases(), made, strict=True)}


def run_interpreted(calls: list[tuple[str, tuple]], folder: Path) -> list[tuple[object, list]]:
    """Return what each call gives, and its arguments as they are afterwards."""
    torch.save([(name, [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]) for name, args in calls], folder / "given")
    command = [sys.executable, "-c", INTERPRETER, str(folder / "given"), str(folder / "made")]
    root = str(Path(__file__).parents[1])
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root}, cwd=folder)
    return torch.load(folder / "made")


def results_of(given: Tensor | tuple[Tensor, ...] | None) -> list[Tensor]:
    return [] if given is None else [given] if isinstance(given, Tensor) else list(given)


@pytest.mark.parametrize("case", cases())
def test_a_kernel_computes_what_it_stands_for(case, interpreted):
    name, function, args = cases()[case]
    right = function.body(*args)
    expected = [*([] if name.endswith("_") else results_of(right)), *args]
    for found, other in zip(interpreted[case], expected, strict=True):
        # Sums in another order. In float32: the interpreter cuts bfloat16 where a card rounds it.
        torch.testing.assert_close(found, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("block_size", "blocks"), [(32, 7), (64, 64), (64, 301), (4096, 3)])
def test_nf4_made_dense_is_bitsandbytes_bit_for_bit(block_size, blocks, tmp_path):
    weight = drawn(blocks, block_size)
    packed, constants = torch.ops.bitsandbytes.quantize_4bit(weight, block_size, "nf4", torch.uint8)
    args = packed, constants, bnb.get_4bit_type("nf4", "cpu"), block_size, torch.empty_like(weight)
    [(_, (*_, found))] = run_interpreted([("dense_nf4", args)], tmp_path)
    expected = torch.ops.bitsandbytes.dequantize_4bit(packed, constants, block_size, "nf4", weight.shape, weight.dtype)
    assert torch.equal(found, expected)


def test_there_is_one_for_each_function_of_elementwise():
    assert all(callable(getattr(card_kernels, name.removeprefix("_"))) for name in elementwise._KERNELS)


TYPES = {
    **dict.fromkeys(("eps", "losses", "log_sums", "denominator", "constants", "levels"), "*fp32"),
    **dict.fromkeys(("rows", "count", "heads", "size", "blocks"), "i32"),
    "targets": "*i64",
    "packed": "*u8",
}
COMPILED = {
    **{f"_norm {size}": card_kernels._row(size) for size in (576, 4096, 12288)},
    **{f"_norm_backward {size}": card_kernels._row(size) for size in (576, 4096, 12288)},
    "_gated": card_kernels._flat(),
    "_gated_backward": card_kernels._flat(),
    "_turned_into_grad": card_kernels._vocabulary(),
    "_losses": card_kernels._vocabulary(),
    "_dense_nf4": card_kernels._codes(64),
    **{f"_turned {heads}": card_kernels._heads(heads, 128) | {"IS_BACK": True} for heads in (8, 32)},
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@pytest.mark.parametrize("card", CAPABILITIES)
@pytest.mark.parametrize("name", COMPILED)
def test_it_compiles_for_cards_moves_many_bytes_at_a_time_and_spills_none(name, card, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants, name = dict(COMPILED[name]), name.split()[0]
    kernel = getattr(card_kernels, name)
    warps, names = constants.pop("num_warps"), kernel.arg_names
    types = dict.fromkeys(names, "*bf16") | TYPES
    # As a call is seen: memory that torch gives, and whole numbers that 16 divides.
    unasked = {*constants, *kernel.do_not_specialize}
    sixteen = {(place,): [["tt.divisibility", 16]] for place, each in enumerate(names) if each not in unasked}
    source = ASTSource(
        kernel,
        {each: "constexpr" if each in constants else types[each] for each in names},
        constants,
        sixteen,
    )
    code = triton.compile(source, target=GPUTarget("cuda", CAPABILITIES[card], 32), options={"num_warps": warps}).asm
    moved = re.findall(r"\b(?:ld|st)\.global\.(\S+)", code["ptx"])
    wide = "v2.b32" if name == "_turned" else "v4.b32"
    assert moved.count(wide) >= (1 if name == "_losses" else 2)
    # Two bytes are moved for nothing but the one logit that each row's loss is about.
    assert [each for each in moved if each in ("b8", "b16")] == ["b16"] * (name == "_losses")
    (tmp_path / "code").write_bytes(code["cubin"])
    used = subprocess.run([CUOBJDUMP, "-res-usage", tmp_path / "code"], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"STACK:(\d+)", used) == ["0"], used
