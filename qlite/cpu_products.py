"""bfloat16 products on a CPU that has no instructions for them: torch's own are 10 to 50 times slower there than float32's.

Most laptops' processors are of that kind: anything without AVX-512 or AMX (or, on ARM, its bf16 extension). There torch multiplies
bfloat16 matrices by plain loops. With ``multiply_in_float32`` the factors are widened inside each product and its result is rounded,
so everything outside is bfloat16 as on any device, and a step is planned alike; what is widened lives while one product is made.
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu_backward")
IN_PLACE = ("addmm_", "baddbmm_")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def has_bfloat16_products() -> bool:
    """Return whether this CPU's matrix products in bfloat16 are at least as fast as those in float32: oneDNN's, where it has them."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # a torch without oneDNN (macOS) has no such question
    return supported is not None and supported()


@cache
def multiply_in_float32() -> None:
    """Let torch's bfloat16 products on the CPU be float32 ones inside, where that is faster; else nothing is done. For good."""
    if has_bfloat16_products():
        return
    for name in PRODUCTS:
        _replace(name, lambda run, *args: _narrowed(run(*map(_widened, args))))
    for name in IN_PLACE:
        _replace(name, lambda run, total, *factors: total.copy_(run(*map(_widened, (total, *factors)))))
    # The logarithms of its sums are float32 anyway.
    _replace(ATTENTION, lambda run, *args: _first_narrowed(*run(*map(_widened, args))))


_library: list[torch.library.Library] = []
"""What was replaced stays so only as long as this holds it."""


def _replace(name: str, in_float32: Callable) -> None:
    """Let the op ``name`` be ``in_float32(op, *args)`` where its first argument is bfloat16."""
    original = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keys, *args, **options):
        if args[0].dtype != torch.bfloat16:
            return original.call_boxed(keys, *args, **options)
        options = {name: _widened(value) for name, value in options.items()}  # attention's mask
        return in_float32(lambda *wide: original.call_boxed(keys, *wide, **options), *args)

    if not _library:
        _library.append(torch.library.Library("aten", "IMPL"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced is what is meant
        _library[0].impl(name, product, "CPU", with_keyset=True)


def _widened(arg: object) -> object:
    return arg.float() if isinstance(arg, Tensor) and arg.dtype == torch.bfloat16 else arg


def _narrowed(result: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return result.bfloat16() if isinstance(result, Tensor) else tuple(map(_narrowed, result))


def _first_narrowed(out: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return (out.bfloat16(), *others)
