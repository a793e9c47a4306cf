"""Elementwise work, one kernel for each piece: RMSNorm, the gated MLP's activation, rotary positions, the loss of given logits.

Written out in torch each is three to fifteen kernels, with float32 copies in between that autograd keeps. Here each is one op in
either pass, computes in float32 inside, and keeps what came in and nothing else. Once ``compile_kernels`` was called they are machine
code: on a CPU by torch's compiler, on a card by hand (qlite/card_kernels.py). Until then they run as they stand. Whoever follows a step
sees the op and not what is in it, so a step is planned and measured alike, compiled or not.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from qlite import device as machine
from qlite.compiling import check, compiled, keep_triton_code

_LIBRARY = torch.library.Library("qlite", "DEF")
MOST_VALUES = 2**31 - 1
"""Of what a kernel is given: beyond, nobody has tried one."""
PART = 1 << 21
"""Logits that are float32 at a time where their loss is not compiled: 8 MiB."""
_KERNELS: dict[str, "_Kernel"] = {}


class Origin(NamedTuple):
    """What a tensor was made of, so that it can be made once more in the place of being kept."""

    op: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def remembering(made: Tensor, op: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return ``made``, which ``op`` gives for ``inputs``, as one that ``origin_of`` knows, where a gradient is to be taken."""
    if made.requires_grad:
        made.origin = Origin(op, tuple(each.detach() for each in inputs))  # the same memory, without what autograd knows of it
    return made


def origin_of(tensor: Tensor) -> Origin | None:
    """Return what ``tensor`` was made of, if it is one of ``remembering``."""
    return getattr(tensor, "origin", None)


class _Kernel:
    """A function of tensors that torch can compile into one kernel."""

    def __init__(self, body: Callable, is_of_one_dtype: bool = True):
        self.body, self.is_of_one_dtype = body, is_of_one_dtype
        self.compiled: dict[tuple[torch.device, torch.dtype], Callable] = {}
        """By what it was compiled for: what is compiled asks nothing of its arguments."""
        _KERNELS[body.__name__] = self

    def __call__(self, *args: Tensor) -> Tensor | Sequence[Tensor]:
        x = args[0]
        if not self.is_compiled_for(x) or (self.is_of_one_dtype and any(arg.dtype != x.dtype for arg in args if arg.dim())):
            return self.body(*args)
        return self.compiled[x.device, x.dtype](*args)

    def is_compiled_for(self, x: Tensor) -> bool:
        """Return whether there is machine code for tensors of ``x``'s kind and size, and as it lies in memory."""
        is_made = (x.device, x.dtype) in self.compiled and machine.is_current(x.device)
        return is_made and 0 < x.numel() <= MOST_VALUES and x.is_contiguous()


def _op(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Make the decorated function the op of ``schema``; ``fake`` returns results of the same shapes without computing them."""

    def define(function: Callable) -> Callable:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qlite::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.qlite, name).default

    return define


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _as(x: Tensor, *shape: int) -> Tensor:
    """Return x's values in ``shape``, without gaps between them, as compiled kernels take them; a view where x has none."""
    return x.reshape(shape).contiguous()


def compile_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Let every op run compiled from now on, for tensors of ``dtype`` on ``device``; return why not, if that cannot be done here."""
    bodies, examples = {name: kernel.body for name, kernel in _KERNELS.items()}, partial(_examples, device, dtype)
    try:
        with torch.no_grad():
            made = _written(bodies, examples) if device.type == "cuda" else compiled(bodies, examples, Path(__file__), device, dtype)
    except Exception as error:  # a compiler can be missing in many ways
        run_plainly()
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    for name, kernel in _KERNELS.items():
        kernel.compiled[device, dtype] = made[name]
    return None


def _written(bodies: dict[str, Callable], examples: Callable[[], dict[str, tuple[Tensor, ...]]]) -> dict[str, Callable]:
    """Return the kernels for cards.

    Raises:
        Exception: there is no Triton, no compiler, or one that fails; a kernel computes something else than its body.
    """
    keep_triton_code()
    from qlite import card_kernels

    written = {name: getattr(card_kernels, name.removeprefix("_")) for name in bodies}
    with _disable_current_modes():  # whoever follows this program's tensors has no business with these
        check(bodies, written, examples())
    return written


def run_plainly() -> None:
    """Let every op run as it stands from now on."""
    for kernel in _KERNELS.values():
        kernel.compiled.clear()


def _examples(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
    """Return arguments for each kernel, as large as a step's: by them the compiler decides what is worth a thread."""
    chance = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance, device=device).to(dtype)

    # On a card they show masks and loops instead: no size is a power of two, or fits what a program takes at a time.
    width, count, size, values, vocabulary = (256, 4, 64, 2**17, 4096) if device.type == "cpu" else (2304, 5, 80, 2**17 + 3, 10_000)
    rows, weight, eps = drawn(512, width), drawn(width), _scalar(1e-6, device)
    heads, cos, sin = drawn(512, count, size), drawn(512, 1, size), drawn(512, 1, size)
    flat = (drawn(values), drawn(values), drawn(values))
    logits, targets = drawn(64, vocabulary), torch.arange(64, device=device)
    return {
        "_norm_rows": (rows, weight, eps),
        "_norm_rows_backward": (drawn(512, width), rows, weight, eps),
        "_gated": flat[:2],
        "_gated_backward_": flat,
        "_turned": (heads, cos, sin),
        "_turned_back": (heads, cos, sin),
        "_losses": (logits, targets),
        "_turned_into_grad_": (logits, targets, torch.full((64,), 9.0, device=device), _scalar(64.0, device)),
    }


@cache
def _scalar(value: float, device: torch.device) -> Tensor:
    """Return ``value`` as a tensor: a number would be a part of what is compiled."""
    return torch.tensor(value, device=device)


@_Kernel
def _norm_rows(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    x32 = x.float()
    unit = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return unit.to(x.dtype) * weight


@_Kernel
def _norm_rows_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    x32 = x.float()
    inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    unit, grad_unit = x32 * inverse, grad.float() * weight.float()
    return ((grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True)) * inverse).to(x.dtype)


@_op("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", lambda x, *_: _like(x))
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm_rows(_as(x, -1, x.shape[-1]), weight, _scalar(eps, x.device)).view(x.shape)


@_op("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps) -> Tensor", lambda _, x, *__: _like(x))
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    grad, rows = (_as(each, -1, x.shape[-1]) for each in (grad, x))
    return _norm_rows_backward(grad, rows, weight, _scalar(eps, x.device)).view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x [..., D] over its root mean square, times ``weight`` [D], which is frozen: [..., D] in x's dtype.

    Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    return _RMSNorm.apply(x, weight, eps)


@_Kernel
def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


@_Kernel
def _gated_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> Tensor:
    x, grad32 = gate.float(), grad.float()
    share = torch.sigmoid(x)
    grad_gate = grad32 * up.float() * share * (1 + x * (1 - share))
    up.copy_(grad32 * x * share)
    gate.copy_(grad_gate)
    return x.new_zeros(())  # torch's compiler wants a result


@_op("swiglu(Tensor gate, Tensor up) -> Tensor", lambda gate, _: _like(gate))
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _gated(_as(gate, -1), _as(up, -1)).view(gate.shape)


@_op("swiglu_backward_(Tensor(a!) gate, Tensor(b!) up, Tensor grad) -> ()", lambda *_: None)
def _swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    _gated_backward_(gate.view(-1), up.view(-1), _as(grad, -1))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        # Where they lie: nothing else needs them, and a block has no larger tensors.
        _swiglu_backward_(gate, up, grad)
        return gate, up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return SiLU(gate) * up, [..., F]. The gradient takes the memory of both, so nobody else may need them.

    Shazeer 2020, arXiv:2002.05202, equation 6.
    """
    return _SwiGLU.apply(gate, up)


@_Kernel
def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (first, second), (cos1, cos2), (sin1, sin2) = x.float().chunk(2, -1), cos.float().chunk(2, -1), sin.float().chunk(2, -1)
    # Rounded before they are joined: the other way round the compiler writes both halves in float32 first.
    return torch.cat([(first * cos1 - second * sin1).to(x.dtype), (second * cos2 + first * sin2).to(x.dtype)], -1)


@_Kernel
def _turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (first, second), (cos1, cos2), (sin1, sin2) = x.float().chunk(2, -1), cos.float().chunk(2, -1), sin.float().chunk(2, -1)
    return torch.cat([(first * cos1 + second * sin2).to(x.dtype), (second * cos2 - first * sin1).to(x.dtype)], -1)


@_op("rotate(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor", lambda x, *_: _like(x))
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    cos, sin = (_as(table.expand(*x.shape[:2], -1), -1, 1, x.shape[-1]) for table in (cos, sin))
    return (_turned_back if back else _turned)(_as(x, -1, *x.shape[2:]), cos, sin).view(x.shape)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x.transpose(1, 2), cos, sin, False).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(grad.transpose(1, 2), *ctx.saved_tensors, True).transpose(1, 2), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, H, T, D], each vector turned by its position's angles, given by ``cos`` and ``sin`` [B or 1, T, D].

    In memory the result is [B, T, H, D], as the product that x came from is. Su et al. 2021, arXiv:2104.09864, equation 34; the
    halves of a vector are its pairs, as in transformers.
    """
    return _Rotary.apply(x, cos, sin)


@partial(_Kernel, is_of_one_dtype=False)
def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    exact = logits.to(torch.float32, copy=True)
    most = exact.amax(1, keepdim=True)
    right = exact.gather(1, targets.unsqueeze(1)).squeeze(1)
    log_sums = exact.sub_(most).exp_().sum(1).log() + most.squeeze(1)
    return log_sums - right, log_sums


# Apart from what it needs the sums of: in one kernel the compiler would write all exponentials in float32 first.
@partial(_Kernel, is_of_one_dtype=False)
def _turned_into_grad_(logits: Tensor, targets: Tensor, log_sums: Tensor, denominator: Tensor) -> Tensor:
    exact = logits.to(torch.float32, copy=True)
    is_right = torch.arange(logits.shape[1], device=logits.device) == targets.unsqueeze(1)
    logits.copy_(exact.sub_(log_sums.unsqueeze(1)).exp_().sub_(is_right.to(torch.int8)).div_(denominator))
    return log_sums.new_zeros(())


def _parts(logits: Tensor, *of_rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield all rows at once; where the loss is not compiled a few at a time, for their float32 is memory then."""
    rows = len(logits) if _losses.is_compiled_for(logits) else max(1, PART // logits.shape[1])
    yield from zip(*(each.split(rows) for each in (logits, *of_rows)), strict=True)


@_op("losses(Tensor logits, Tensor targets) -> Tensor", lambda logits, _: logits.new_empty(len(logits), dtype=torch.float32))
def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p(target) of each row of ``logits`` [N, V], unknown to autograd: [N] float32, in nats; ``targets`` [N] int64."""
    return torch.cat([_losses(*part)[0] for part in _parts(logits, targets)])


@_op(
    "losses_backward_(Tensor(a!) logits, Tensor targets, Tensor denominator) -> Tensor",
    lambda logits, *_: logits.new_empty(len(logits), dtype=torch.float32),
)
def losses_backward_(logits: Tensor, targets: Tensor, denominator: Tensor) -> Tensor:
    """Return what ``losses`` does, and turn ``logits`` into the gradient of its sum over ``denominator`` (float32) where they lie."""
    found = []
    for part, of_part in _parts(logits, targets):
        values, log_sums = _losses(part, of_part)
        _turned_into_grad_(part, of_part, log_sums, denominator)
        found.append(values)
    return torch.cat(found)
