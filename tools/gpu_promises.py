"""What tools/gpu_check.py checks of what a card computes, each against its CPU twin: products, vocabulary, optimizers, packed attention.

A check is a function that yields results: one promise each, with a figure and the limit it is held to.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qlite.memory.ledger import Ledger
from qlite.model import documents
from qlite.model.documents import Documents, attend_by_documents, documents_attention
from qlite.model.packing import check_packing
from qlite.optim.build import UNPAGED, Optimizer
from qlite.quant.embedding import QuantEmbedding
from qlite.quant.linear import Storage
from qlite.units import MIB
from tests.tiny import STORAGES as TINY_STORAGES
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
HOLDS, FAILS, TOLD, SKIPPED = "holds", "FAILS", "told", "skipped"
STORAGES = {
    "nf4": Storage(4),
    "nf4, plain constants": Storage(4, double_quant=False),
    "fp4": Storage(4, quant_type="fp4"),
    "int8": Storage(8),
}


@dataclass(frozen=True)
class Result:
    """One promise: ``figure`` is what was measured, in words, ``limit`` what it is held to; ``values`` go into the file."""

    name: str
    verdict: str
    figure: str
    limit: str = ""
    values: dict | None = None


@dataclass(frozen=True)
class Bench:
    """Where checks run: ``where`` they compute, ``folder`` for their files, and whether they keep to small models."""

    where: torch.device
    folder: Path
    is_quick: bool
    idle_bytes: int | None = None
    """In use on the card, by the driver's count, before this process had a CUDA context."""

    @property
    def has_card(self) -> bool:
        return self.where.type == "cuda"

    def part(self, name: str) -> Path:
        """Return a new folder for one part of a check."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        return folder


Check = Callable[[Bench], Iterator[Result]]


def at_most(name: str, value: float, limit: float, shown: Callable[[float], str] = "{:.2g}".format, **values: object) -> Result:
    """Return whether ``value`` is at most ``limit``; NaN is not."""
    verdict = HOLDS if value <= limit else FAILS
    return Result(name, verdict, shown(value), f"<= {shown(limit)}", {"value": value, "limit": limit, **values})


def is_so(name: str, fact: bool, figure: str, limit: str, **values: object) -> Result:
    """Return whether ``fact`` holds."""
    return Result(name, HOLDS if fact else FAILS, figure, limit, values)


def told(name: str, figure: str, **values: object) -> Result:
    """Return a figure that is held to nothing."""
    return Result(name, TOLD, figure, "", values)


def skipped(name: str, why: str = "needs a card") -> Result:
    """Return that this promise was not checked, and why."""
    return Result(name, SKIPPED, f"skipped: {why}")


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def mib(size: float) -> str:
    return f"{size / MIB:.1f} MiB"


def distance(got: Tensor, wanted: Tensor) -> float:
    """Return |got - wanted| / |wanted|, on the CPU in float64."""
    got, wanted = got.detach().cpu().double(), wanted.detach().cpu().double()
    return ((got - wanted).norm() / wanted.norm()).item()


class Peak:
    """While it is entered: the most bytes allocated on the device.

    With a ``model``, its weights count: a streamed one's come and go. Without, only what is more than was there. Where there is no card
    the ledger counts, which leaves what lies on the host out.
    """

    def __init__(self, where: torch.device, model: nn.Module | None = None):
        self.where, self.model, self.bytes = where, model, 0
        self._ledger, self._before = Ledger(), 0

    def __enter__(self) -> "Peak":
        if self.where.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() if self.model is None else 0
        else:
            if self.model is not None:
                self._ledger.adopt_model(self.model)
            self._ledger.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.where.type == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        else:
            self._ledger.__exit__(*error)
            self.bytes = max(peak.bytes for peak in self._ledger.moments.values())


def products(bench: Bench) -> Iterator[Result]:
    """4-bit and int8 products and their gradients, few rows and many, against the CPU twin's dense weight in float32."""
    size = 512 if bench.is_quick else 4096
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    for name, storage in STORAGES.items():
        twin, layer = (storage.make(size, size, True, torch.bfloat16, where) for where in (CPU, bench.where))
        twin.store(weight)
        layer.store(weight, bench.where)
        others = (twin.weight != layer.weight.cpu()).double().mean().item()
        # bitsandbytes' two kernels for fp4 differ themselves: on an H200 in 1.1 % of the bytes.
        yield at_most(f"{name}: bytes packed otherwise than on a CPU", others, 0.02 if name == "fp4" else 1e-3, percent)
        layer.share(twin)
        layer.to(bench.where).bias = torch.linspace(-1, 1, size).to(bench.where, torch.bfloat16)
        dense, worst = twin.dense(torch.float32), [0.0, 0.0]
        for rows in (1, 4, 5, 64) if bench.is_quick else (1, 2, 4, 5, 64, 2048):
            x, grad = (torch.randn(rows, size, generator=generator).bfloat16() for _ in range(2))
            x[:, 7] *= 20  # an outlier feature, which the int8 product keeps apart
            given = x.to(bench.where).requires_grad_()
            y = layer(given)
            (back,) = torch.autograd.grad(y, given, grad.to(bench.where))
            wanted = nn.functional.linear(x.float(), dense, layer.bias.float().cpu())
            found = distance(y, wanted), distance(back, grad.float() @ dense)
            worst = [max(pair) for pair in zip(worst, found, strict=True)]
        yield at_most(f"{name}: product", worst[0], 0.03 if storage.bits == 8 else 0.01)
        yield at_most(f"{name}: gradient", worst[1], 0.01)


def vocabulary(bench: Bench) -> Iterator[Result]:
    """Embedding and head in few bits: a lookup is the dense table's rows; a large head is never dense as a whole."""
    rows, columns = (8 * 1024, 256) if bench.is_quick else (128 * 1024, 2048)
    table = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(rows, (4, 64), generator=torch.Generator().manual_seed(1)).to(bench.where)
    for bits in (4, 8):
        embedding = QuantEmbedding(nn.Embedding(rows, columns, device="meta"), Storage(bits), torch.bfloat16)
        embedding.store(table, bench.where)
        got, wanted = embedding(ids), embedding.table.dense(torch.bfloat16)[ids]
        yield is_so(f"embedding, {bits} bit: rows", torch.equal(got, wanted), f"{distance(got, wanted):.2g}", "the dense ones, bit for bit")
        head = Storage(bits, int8_product=False).make(columns, rows, False, torch.bfloat16, "meta")
        head.share(embedding.table)
        x = torch.randn(16, columns, generator=torch.Generator().manual_seed(2)).to(bench.where, torch.bfloat16).requires_grad_()
        with Peak(bench.where) as peak:
            y = head(x)
            (back,) = torch.autograd.grad(y.sum(), x)
        dense = embedding.table.dense(torch.float32)
        yield at_most(f"head, {bits} bit: product", distance(y, x.float() @ dense.T), 0.01)
        yield at_most(f"head, {bits} bit: gradient", distance(back, dense.sum(dim=0).expand_as(x)), 0.02)
        if not bench.is_quick:  # a small one is made dense at once
            yield at_most(f"head, {bits} bit: bytes of both passes", peak.bytes, 0.7 * rows * columns * 2, mib)


def paged(bench: Bench) -> Iterator[Result]:
    """Paged optimizers: their state is paged, and they step as their unpaged twins do."""
    count, steps = 1_000_000, 5
    start = torch.linspace(-1, 1, count)
    for name, twin in UNPAGED.items():
        weights, pages = {}, {}
        for each in (name, twin):
            param = nn.Parameter(start.to(bench.where, torch.bfloat16))
            optimizer = Optimizer(name=each).build([{"params": [param], "lr": 1e-3}], bench.where, lambda _: None)
            for step in range(1, steps + 1):
                (param * torch.cos(torch.arange(count, device=bench.where) * float(step)).bfloat16()).sum().backward()
                optimizer.step()
            weights[each] = param.detach().clone()
            pages[each] = any(getattr(tensor, "is_paged", False) for tensor in optimizer.state()[0].values())
        moved = distance(weights[name], start)
        if bench.has_card:
            yield is_so(f"{name}: state", pages[name], "paged" if pages[name] else "not paged", "paged")
        else:
            yield skipped(f"{name}: state")
        yield is_so(f"{name}: steps", moved > 1e-3, f"weights moved by {percent(moved)}", "> 0.1 %", value=moved)
        yield at_most(f"{name}: weights after {steps} steps, to {twin}'s", distance(weights[name], weights[twin]), 1e-6)


def packing(bench: Bench) -> Iterator[Result]:
    """Attention inside documents against the CPU's in float32; and the guard lets ours pass."""
    positions = torch.cat([torch.arange(length) for length in (90, 1, 37, 30, 98)]).view(2, 128)
    for size in (64, 128):
        torch.manual_seed(0)
        inputs, weights = [torch.randn(2, heads, 128, size) for heads in (9, 3, 3)], torch.randn(2, 128, 9, size)
        wanted, _ = attended(inputs, weights, positions, CPU, torch.float32)
        got, calls = attended(inputs, weights, positions, bench.where, torch.bfloat16)
        yield at_most(f"head size {size}: output and gradients", max(map(distance, got, wanted)), 0.02)
        # Cards before Ampere have no flash attention: there each document is a call of its own, which is right, and slower.
        name = f"head size {size}: one kernel for all documents"
        yield told(name, "yes" if calls == 1 else "no", calls=calls) if bench.has_card else skipped(name)
    for storage in TINY_STORAGES:
        model = tiny_llama(storage, torch.bfloat16, num_hidden_layers=8)
        attend_by_documents(model)
        check_packing(model.to(bench.where))  # raises where they do
        yield is_so(f"{storage}: documents see each other", True, "no", "no")


def attended(inputs: list[Tensor], weights: Tensor, positions: Tensor, where: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], int]:
    """Return attention's output and the gradients of query, key and value, and how often torch's kernel for many documents ran."""
    module, calls, kernel = nn.Module(), [], documents.varlen_attn
    documents._varlen_options()  # which reads the signature of torch's own, once
    module.num_key_value_groups = inputs[0].shape[1] // inputs[1].shape[1]
    documents.varlen_attn = lambda *args, **options: calls.append(1) or kernel(*args, **options)
    try:
        given = [x.to(where, dtype).requires_grad_() for x in inputs]
        out, _ = documents_attention(module, *given, None, Documents.of(positions, where))
        return [out, *torch.autograd.grad((out * weights.to(out)).sum(), given)], len(calls)
    finally:
        documents.varlen_attn = kernel
