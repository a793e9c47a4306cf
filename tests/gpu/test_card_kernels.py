"""The kernels written for cards, on one: each computes what it stands for, at the sizes of real models and at odd ones."""

import pytest
import torch

from qlite.model import elementwise
from qlite.quant import card_dense
from qlite.quant.linear import MOST_FUSED_ROWS, Storage

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]
CARD = torch.device("cuda", 0)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(CARD).manual_seed(sum(shape)), device=CARD)


CASES = {
    "_norm_rows": lambda n, d: (drawn(n, d), drawn(d)),
    "_norm_rows_backward": lambda n, d: (drawn(n, d), drawn(n, d) + 1, drawn(d)),
    "_gated": lambda n, d: (3 * drawn(n * d), drawn(d * n, 1)[:, 0].contiguous()),
    "_gated_backward_": lambda n, d: (3 * drawn(n * d), drawn(n * d) + 1, drawn(n * d)),
    "_turned": lambda n, d: (drawn(n, 5, d), drawn(n, 1, d), drawn(n, 1, d) + 1),
    "_turned_back": lambda n, d: (drawn(n, 5, d), drawn(n, 1, d), drawn(n, 1, d) + 1),
    "_losses": lambda n, d: (9 * drawn(n, 10 * d),),
    "_turned_into_grad_": lambda n, d: (9 * drawn(n, 10 * d),),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2048, 4096), (77, 96), (3, 12288)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_computes_what_it_stands_for(name, shape, dtype):
    assert elementwise.compile_kernels(CARD, dtype) is None
    args = [arg.to(dtype) for arg in CASES[name](*shape)]
    targets = torch.arange(shape[0], device=CARD) % shape[1]
    if name.startswith("_norm"):
        args.append(torch.tensor(1e-5, device=CARD))
    elif name == "_losses":
        args.append(targets)
    elif name == "_turned_into_grad_":
        args += [targets, args[0].float().logsumexp(1), torch.tensor(7.0, device=CARD)]
    kernel = elementwise._KERNELS[name]
    assert kernel.is_compiled_for(args[0])
    mine, theirs = ([arg.clone() for arg in args] for _ in range(2))
    found, expected = kernel.compiled[CARD, dtype](*mine), kernel.body(*theirs)
    pairs = list(zip(mine, theirs, strict=True))
    if not name.endswith("_"):
        pairs += [(found, expected)] if isinstance(found, torch.Tensor) else list(zip(found, expected, strict=True))
    for ours, other in pairs:
        # Of bfloat16 the next number at most, where sums in another order are rounded apart; a norm is rounded twice.
        steps = 2 if name == "_norm_rows" else 1
        torch.testing.assert_close(ours, other, rtol=steps * 2**-7 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "block_size"), [((11008, 4096), 64), ((4096, 4096), 4096), ((33, 96), 32), ((7, 100), 64)], ids=str)
def test_nf4_made_dense_is_bitsandbytes_bit_for_bit(shape, block_size, dtype):
    assert card_dense._is_exact(CARD, block_size)
    packed, constants = torch.ops.bitsandbytes.quantize_4bit(0.02 * drawn(*shape), block_size, "nf4", torch.uint8)
    found = card_dense.dense_nf4(packed, constants, block_size, shape, dtype)
    assert torch.equal(found, torch.ops.bitsandbytes.dequantize_4bit(packed, constants, block_size, "nf4", shape, dtype))


@pytest.mark.parametrize("rows", [MOST_FUSED_ROWS - 1, MOST_FUSED_ROWS + 1])
def test_a_product_is_the_same_where_bitsandbytes_may_fuse_it_and_where_it_never_does(rows):
    layer = Storage(4).make(512, 768, False, torch.bfloat16, CARD)
    layer.store(0.02 * drawn(768, 512))
    x = drawn(rows, 512).bfloat16()
    exact = x.double() @ layer.dense(torch.float32).double().T
    assert (layer.product(x).double() - exact).norm() <= 2**-7 * exact.norm()
