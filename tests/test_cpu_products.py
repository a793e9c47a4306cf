"""On a CPU without bfloat16 instructions a product is float32's, rounded once, in both passes; elsewhere it is torch's own."""

import subprocess
import sys

# Each in a process of its own, because what is replaced stays replaced.
PASSES = """
import torch
from torch import nn
from qlite import cpu_products

cpu_products.has_bfloat16_products = lambda: {has}
cpu_products.multiply_in_float32()

def drawn(*shape):
    return torch.randn(*shape, generator=generator).bfloat16()

def passes(dtype):
    x, w, total, a, b, q, k, v = (t.to(dtype).requires_grad_() for t in given)
    linear = nn.functional.linear(x, w)
    added = torch.addmm(total, a, b, alpha=0.5)
    in_place = (total * 1).addmm_(a, b, alpha=0.5)
    batched = torch.bmm(q[0], k[0].transpose(1, 2))
    attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    results = [linear, added, in_place, batched, attended]
    assert all(r.dtype == dtype for r in results)
    weighted = [(r.float() * torch.linspace(-1, 1, r.numel()).view(r.shape)).sum() for r in results]
    grads = torch.autograd.grad(weighted, [x, w, total, a, b, q, k, v])
    assert all(g.dtype == dtype for g in grads)
    return [r.detach() for r in results], grads

generator = torch.Generator().manual_seed(0)
heads = (1, 2, 16, 64)
given = [drawn(32, 300), drawn(48, 300), drawn(32, 48), drawn(32, 7), drawn(7, 48), drawn(*heads), drawn(*heads), drawn(*heads)]
(found, found_grads), (exact, exact_grads) = passes(torch.bfloat16), passes(torch.float32)
{check}
"""
ROUNDED_ONCE = """
for name, one, other in zip(["linear", "added", "in place", "batched", "attended"], found, exact):
    assert torch.equal(one, other.bfloat16()), name
for one, other in zip(found_grads, exact_grads):
    assert (one.float() - other).norm() < 0.02 * other.norm()
"""
UNTOUCHED = """
assert not cpu_products._library
"""


def run(has: bool, check: str) -> None:
    script = PASSES.format(has=has, check=check)
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_instructions_products_are_float32_ones_rounded_once():
    run(False, ROUNDED_ONCE)


def test_with_them_nothing_is_replaced():
    run(True, UNTOUCHED)
