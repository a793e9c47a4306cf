"""How much a piece of a run has to compute and to move, and how long a card would take: a roofline over the ops that torch runs.

Each op takes the longer of its arithmetic at the card's rate and its traffic at the card's bandwidth, and no less than a launch.
Source of the model: Williams, Waterman and Patterson 2009, "Roofline", doi:10.1145/1498765.1498785. The three constants are
assumptions, not measurements: a time from here is good to choose between plans and to tell minutes from hours.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from qlite.memory.cards import Card

MATMUL_EFFICIENCY = 0.6
"""Share of its peak that a card reaches in a layer's products; libraries reach 0.5 to 0.8 on those of a transformer."""
BANDWIDTH_EFFICIENCY = 0.8
"""Share of its bandwidth that a card reaches in large elementwise ops."""
LAUNCH_SECONDS = 4e-6
"""The least time between two kernels started one after the other from Python."""

# They make a tensor without a kernel, or share its memory without saying so.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "set_", "resize_"}
# They write what they change without reading it first.
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "exponential_", "random_"}
# They take a tensor for its shape alone.
_LIKE = {"zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full"}
# They read only as much of their first argument as they return.
_GATHERING = {"embedding", "index", "index_select", "gather", "take", "nll_loss_forward"}

_Group = tuple[torch.dtype | None, int, int]
"""The type that is multiplied (None: nothing is), FLOPs and bytes of one op."""


class Work(TorchDispatchMode):
    """Counts FLOPs, bytes and kernels of what runs while it is entered; on fake tensors too, if entered inside their mode.

    A multiplication and an addition are two FLOPs, and only products and attention have any; the causal half of attention is not
    left out. Bytes are those that an op reads and writes, its scratch not counted. Views are nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._groups: Counter[_Group] = Counter()
        self._ops: dict[OpOverload, _Op] = {}

    @property
    def flops(self) -> int:
        """Floating-point operations of all products."""
        return sum(flops * count for (_, flops, _), count in self._groups.items())

    @property
    def bytes(self) -> int:
        """Bytes read and written by all ops."""
        return sum(size * count for (_, _, size), count in self._groups.items())

    @property
    def kernels(self) -> int:
        """Ops that are not views; a custom op is one, though it may launch several."""
        return self._groups.total()

    def seconds(self, card: Card) -> float:
        """Return the time on ``card`` if every op waits for the one before it."""
        total = 0.0
        for (dtype, flops, size), count in self._groups.items():
            arithmetic = flops / (MATMUL_EFFICIENCY * _rate(card, dtype))
            traffic = size / (BANDWIDTH_EFFICIENCY * card.bandwidth)
            total += count * max(arithmetic, traffic, LAUNCH_SECONDS)
        return total

    def as_record(self) -> list:
        """Return the counts in JSON's types."""
        return [[dtype and str(dtype).removeprefix("torch."), flops, size, count] for (dtype, flops, size), count in self._groups.items()]

    @classmethod
    def of_record(cls, record: list) -> "Work":
        """Return the counts that ``as_record`` has written."""
        work = cls()
        for dtype, flops, size, count in record:
            work._groups[dtype and getattr(torch, dtype), flops, size] = count
        return work

    def drawn_on(self, longer: "Work", factor: float) -> "Work":
        """Return what this becomes when it grows by ``factor`` times its difference to ``longer``: more of the same ops."""
        grown = Work()
        for group in {**self._groups, **longer._groups}:
            grown._groups[group] = round(self._groups[group] + (longer._groups[group] - self._groups[group]) * factor)
        return grown

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        op = self._ops.get(func)
        if op is None:
            op = self._ops[func] = _Op.of(func)
        if op.is_composite:  # aten.linear and its like come whole in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if not op.is_free and (size := op.traffic(args, kwargs, out)):
            flops = op.formula(*args, **kwargs, out_val=out) if op.formula else 0
            self._groups[args[0].dtype if flops else None, flops, size] += 1
        return out


def _rate(card: Card, dtype: torch.dtype | None) -> float:
    if dtype == torch.bfloat16:
        return card.bf16_flops if card.has_bf16 else card.fp32_flops
    # int8 has at least the rate of float16, and its products here are too few to be worth a column of the table.
    return card.bf16_flops if dtype in (torch.float16, torch.int8) else card.fp32_flops


@dataclass(frozen=True)
class _Op:
    """What is known of an op by its schema alone."""

    is_free: bool
    is_composite: bool
    is_gathering: bool
    reads: tuple[int, ...]
    """How often each positional argument is passed over: 2 if it is changed in place."""
    named_reads: dict[str, int]
    is_new: tuple[bool, ...]
    """Which of the outputs are new memory, not an argument handed back."""
    formula: Callable | None

    @classmethod
    def of(cls, func: OpOverload) -> "_Op":
        schema = func._schema
        namespace, _, name = schema.name.rpartition("::")
        aliases = [result.alias_info for result in schema.returns]
        reads = {}
        for argument in schema.arguments:
            is_changed = argument.alias_info is not None and argument.alias_info.is_write
            reads[argument.name] = 0 if name in _LIKE else 2 if is_changed and not argument.is_out and name not in _OVERWRITING else 1
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        is_question = bool(aliases) and not any("Tensor" in str(result.type) for result in schema.returns)
        return cls(
            is_free=name in _FREE or is_view or is_question,
            is_composite=namespace == "aten" and func._can_decompose(),
            is_gathering=name in _GATHERING,
            reads=tuple(reads.values()),
            named_reads=reads,
            is_new=tuple(alias is None for alias in aliases),
            formula=flop_registry.get(func.overloadpacket) or _FORMULAS.get(schema.name),
        )

    def traffic(self, args: tuple, kwargs: dict, out: object) -> int:
        """Return the bytes that one call reads and writes."""
        if len(self.is_new) == 1:  # one tensor, or one list of them
            written = _bytes(out) if self.is_new[0] else 0
        else:
            written = sum(_bytes(one) for one, is_new in zip(out or (), self.is_new, strict=True) if is_new)
        sizes = [_bytes(value) * times for value, times in zip(args, self.reads, strict=False)]
        if self.is_gathering and sizes:
            sizes[0] = min(sizes[0], written)
        return written + sum(sizes) + sum(_bytes(value) * self.named_reads[name] for name, value in kwargs.items())


def _bytes(value: object) -> int:
    """Return the bytes behind a tensor or a list of them; an expanded one has no more than its storage."""
    if isinstance(value, Tensor):
        return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: object, out_val: object, **__: object) -> int:
    """Return the FLOPs of Q K^T and P V: query [B, H, T, D], key [B, H, S, D], value [B, H, S, E]."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward_flops(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: object, out_val: object, **___: object) -> int:
    """Return the FLOPs of five products: Q K^T again, and the gradients of V, P, Q and K."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def _product_flops(rows: Tensor, *_: object, out_val: object, **__: object) -> int:
    """Return the FLOPs of rows [..., in] by a packed weight, to [..., out]."""
    out = out_val[0] if isinstance(out_val, tuple) else out_val
    return 2 * rows.numel() * out.shape[-1]


# What torch's own registry lacks: attention on a CPU, where plans are traced, and the products by packed weights.
_FORMULAS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward_flops,
    "aten::_int_mm": _product_flops,
    "bitsandbytes::gemv_4bit": _product_flops,
    "bitsandbytes::gemm_4bit": _product_flops,
    "bitsandbytes::int8_linear_matmul": _product_flops,
    "bitsandbytes::int8_scaled_mm": _product_flops,
    "bitsandbytes::int8_mixed_scaled_mm": _product_flops,
}
