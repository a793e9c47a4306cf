"""A training step on CUDA tensors that have shapes and no bytes, with no card: forward, backward and optimizer, every device mix-up shows.

python tools/fake_cuda.py                       # every recipe for a card, every case: about 25 minutes on one core
python tools/fake_cuda.py --only llama8b --case streamed
python tools/fake_cuda.py --capability 7.5      # a Turing card (RTX 20, T4), which has no flash attention

torch's FakeTensorMode gives each tensor a device and computes nothing; where an op meets tensors of two devices it fails as a card would.
It needs a CUDA build of torch (5.5 GB), in an environment of its own, and where there is no card a C compiler:

    python -m venv ENV && ENV/bin/pip install "torch===2.13.0" -e .    # "===": "==" takes a local 2.13.0+cpu, if pip finds one, too
    ENV/bin/python tools/fake_cuda.py

Without a card torch's autograd refuses CUDA tensors: it asks the driver for a stream. So the tool starts itself again with a library in
front of the driver's that answers such questions (one card, 24 GiB) and can do nothing else: no memory, no kernel, no copy.

Models have the recipe's true widths and two blocks. Beside each verdict stands the training peak by the ledger, as planned on fake CPU
tensors and as found on fake CUDA tensors, where other kernels run: what the plan would miss. Not seen are what a kernel allocates inside,
paged state (its unpaged twin stands in), the number of outliers of an int8 product (none are taken), and anything that reads a value.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlite.errors import QliteError
from qlite.memory import terms
from qlite.memory.kernels import WholeKernels
from qlite.memory.ledger import Ledger, Peak
from qlite.model.blocks import decoder_blocks
from qlite.model.documents import documents_told
from qlite.model.load import fill
from qlite.model.lowering import lower_memory
from qlite.model.shapes import BaseShapes, base_shapes
from qlite.offload import window
from qlite.optim import build
from qlite.quant.linear import Linear8bit, Storage
from qlite.recipe.read import read_recipe
from qlite.recipe.schema import Recipe
from qlite.serving.decoding import largest_passes
from qlite.training.forecast import (
    ANSWERS,
    ATTACH,
    EVALUATION,
    LOAD,
    OPTIMIZER_STEP,
    PHASES,
    STEP,
    Workload,
    adopt_all,
    largest,
    worst_workload,
)
from qlite.training.step import Stepper
from qlite.units import MIB

ROOT = Path(__file__).parents[1]
BLOCKS = 2
STARTED_AGAIN = "QLITE_FAKE_CARD"
NEEDS = 'fake CUDA tensors need a CUDA build of torch: python -m venv ENV && ENV/bin/pip install "torch===2.13.0" -e .'

LOWERED = ["memory.saved_inputs=host", "memory.mlp_chunk=128", "memory.base=host"]
CASES: dict[str, list[str]] = {
    "as it is": [],
    "8 bit": ["base.bits=8"],
    "16 bit": ["base.bits=16"],
    "embedding and head 8 bit": ["base.embedding_bits=8", "base.head_bits=8"],
    "embedding and head 4 bit": ["base.embedding_bits=4", "base.head_bits=4"],
    "embedding on host": ["memory.embedding=host"],
    "8-bit embedding on host": ["base.embedding_bits=8", "base.head_bits=8", "memory.embedding=host"],
    "4-bit embedding on host": ["base.embedding_bits=4", "base.head_bits=4", "memory.embedding=host"],
    "inputs on host": ["memory.saved_inputs=host"],
    "inputs in 8 bit": ["memory.saved_inputs=8bit"],
    "MLP in tiles": ["memory.mlp_chunk=128"],
    "tiles, dropout": ["memory.mlp_chunk=128", "method.dropout=0.1"],
    "streamed": ["memory.base=host"],
    "streamed, 8 bit": ["memory.base=host", "base.bits=8"],
    "streamed, 16 bit": ["memory.base=host", "base.bits=16"],
    "packed": ["train.packing=true"],
    "elementwise": ["memory.checkpointing=elementwise"],
    "packed, eager": ["train.packing=true", "base.attention=eager"],
    "packed, sdpa": ["train.packing=true", "base.attention=sdpa"],
    "DoRA": ["method.dora=true"],
    "DoRA, 8 bit, dropout": ["method.dora=true", "base.bits=8", "method.dropout=0.1"],
    "DoRA, streamed": ["method.dora=true", "memory.base=host"],
    "attention kept": ["memory.checkpointing=attention"],
    "attention kept, packed": ["memory.checkpointing=attention", "train.packing=true"],
    "no checkpointing": ['memory.checkpointing="none"'],
    "as written": ["base.fused=false"],
    "float32": ["base.dtype=float32"],
    "adamw": ["optimizer.name=adamw"],
    "lion8bit": ["optimizer.name=lion8bit"],
    "torch_adamw": ["optimizer.name=torch_adamw"],
    "all lowered": [*LOWERED, "train.packing=true", "method.dropout=0.1"],
    "all lowered, untied": [*LOWERED, "memory.embedding=host", "base.embedding_bits=8", "base.head_bits=8", "method.dora=true"],
}


@dataclass(frozen=True)
class Outcome:
    """What became of one case of one recipe: ``error`` is empty where it ran; ``place`` is the line of ours that it comes from."""

    recipe: str
    case: str
    error: str = ""
    place: str = ""
    is_refusal: bool = False
    planned: dict[str, int] | None = None
    """Tensor bytes at the peak of each phase, traced on fake CPU tensors."""
    found: dict[str, int] | None = None
    """The same on fake CUDA tensors."""

    def line(self) -> str:
        """Return the outcome as a line of the table."""
        head = f"{self.recipe:<16} {self.case:<26}"
        if self.error:
            return f"{head} {'refused' if self.is_refusal else 'FAILS  '} {self.place} {self.error}".rstrip()
        planned, found = self.planned[STEP], self.found[STEP]
        return f"{head} ok      training peak {planned / MIB:9.1f} planned {found / MIB:9.1f} found {100 * (found / planned - 1):+6.2f} %"


def main(argv: list[str]) -> int:
    """Print a line for each recipe and case, and write build/fake_cuda.json; return 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="recipes whose name contains this")
    parser.add_argument("--case", default="", help="cases whose name contains this")
    parser.add_argument("--capability", default="8.9", help="compute capability of the card that is not there: 7.5 is Turing")
    args = parser.parse_args(argv)
    if torch.version.cuda is None:
        print(f"torch {torch.__version__} is a build without CUDA; {NEEDS}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        return start_again(argv, args.capability)
    cases = {name: keys for name, keys in CASES.items() if args.case in name}
    paths = [path for path in sorted((ROOT / "recipes").glob("*gb.toml")) if args.only in path.stem]
    outcomes = []
    for path in paths:
        for name, keys in cases.items():
            outcomes.append(outcome_of(path, name, keys))
            print(outcomes[-1].line(), flush=True)
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build/fake_cuda.json").write_text(json.dumps([vars(each) for each in outcomes], indent=1))
    failed = [each for each in outcomes if each.error and not each.is_refusal]
    print(f"{len(outcomes)} cases of {len(paths)} recipes: {len(failed)} fail")
    return 1 if failed else 0


def outcome_of(path: Path, case: str, keys: list[str]) -> Outcome:
    """Return what becomes of the recipe in ``path`` with ``keys``."""
    kept = Outcome(path.stem, case)
    try:
        recipe = read_recipe(path, keys)
        shapes = base_shapes(recipe.base, lambda *_: None)
        shapes = replace(shapes, config=cut(shapes.config, BLOCKS))
        planned, found = (trace_on(torch.device(name), recipe, shapes, worst_workload(recipe)) for name in ("cpu", "cuda:0"))
        return replace(kept, planned=bytes_of(planned), found=bytes_of(found))
    except QliteError as error:
        return replace(kept, error=str(error).splitlines()[0], is_refusal=True)
    except Exception as error:
        place = next((f"{path}:{number}" for path, number in reversed(list(places_of_ours(error)))), "")
        return replace(kept, error=f"{type(error).__name__}: {str(error).splitlines()[0][:160]}", place=place)


def places_of_ours(error: Exception) -> Iterator[tuple[Path, int]]:
    """Yield (file, line) of qlite's own frames on the way to ``error``, those that only follow what runs left out."""
    for frame in traceback.extract_tb(error.__traceback__):
        with suppress(ValueError):
            path = Path(frame.filename).relative_to(ROOT)
            if path.parts[0] == "qlite" and path.parts[1] != "memory":
                yield path, frame.lineno


def bytes_of(peaks: dict[str, Peak]) -> dict[str, int]:
    """Return the bytes of each phase's peak."""
    return {phase: peaks[phase].bytes for phase in PHASES if phase in peaks}


def cut(config: object, blocks: int) -> object:
    """Return ``config`` with its first ``blocks`` blocks only."""
    short = copy.deepcopy(config)
    short.num_hidden_layers = blocks
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:blocks]
    return short


def trace_on(where: torch.device, recipe: Recipe, shapes: BaseShapes, work: Workload) -> dict[str, Peak]:
    """Return the peaks of ``work`` on fake tensors of the device ``where``: load, attach, lower, train twice, evaluate, decode."""
    for batch in (work.train, work.held_out):
        assert batch is None or len(batch.targets)  # counted now: on fake tensors nothing can be counted
    Storage(4).make(64, 64, False, torch.float32, "cpu").store(torch.zeros(64, 64))  # bitsandbytes keeps code tables: from real numbers
    model, ledger = recipe.base.empty(shapes.config, where), Ledger()
    with stand_ins(), Fake(allow_non_fake_inputs=True), WholeKernels(), SameDevice(), ledger:
        with ledger.phase(LOAD, terms.BASE):
            fill(
                model,
                shapes.checkpoint(model, lambda _, shape, dtype: window(lambda: torch.empty(shape, dtype=dtype))),
                where,
                lambda *_: None,
            )
        model.requires_grad_(False).eval()
        ledger.adopt_model(model)
        with ledger.phase(ATTACH, terms.ADAPTER):
            recipe.method.attach(model)
        lower_memory(model, recipe.memory, where)
        optimizer = recipe.optimizer.build(recipe.method.param_groups(model, recipe.optimizer.lr), where, lambda _: None)
        adopt_all(ledger, model, optimizer)
        stepper = Stepper(model, recipe.method, recipe.memory.loss_chunk, where)
        with ledger.following(model, list(decoder_blocks(model).values())), documents_told(work.train.position_ids is not None):
            for _ in range(2):  # the second pass meets what the first has left: streamed blocks, gradients
                with ledger.phase(STEP):
                    stepper.accumulate([work.train])
                with ledger.phase(OPTIMIZER_STEP, terms.OPTIMIZER):
                    optimizer.clip(recipe.train.clip_norm)
                    optimizer.step()
        with ledger.following(model, list(decoder_blocks(model).values())), torch.no_grad(), documents_told(False):
            if work.held_out is not None:
                with ledger.phase(EVALUATION):
                    model.eval()
                    stepper.loss(work.held_out, 1)
            with ledger.phase(ANSWERS, kept=terms.CACHE):
                for _, answer in largest_passes(model, *(work.answers or (2, 64, 16)), where):
                    answer()
    return largest(ledger.moments)


class Fake(FakeTensorMode):
    """Fake tensors that take nothing from a card, though there is one to be seen."""

    avoid_device_init = True


class SameDevice(TorchDispatchMode):
    """Holds bitsandbytes' ops to what torch's own are held to: their fake kernels take tensors of any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bitsandbytes":
            given = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            if len(given) > 1:
                raise RuntimeError(f"{func}: its tensors are on {', '.join(sorted(map(str, given)))}")
        return func(*args, **(kwargs or {}))


@contextmanager
def stand_ins() -> Iterator[None]:
    """Let what needs values or the driver's own memory have a stand-in: paged state lies on the device, int8 products have no outliers."""
    kept = build.supports_paging, Linear8bit.int8_product
    build.supports_paging, Linear8bit.int8_product = (lambda _: False), _int8_product
    try:
        yield
    finally:
        build.supports_paging, Linear8bit.int8_product = kept


def _int8_product(layer: Linear8bit, x: Tensor) -> Tensor:
    rows = x.reshape(-1, layer.in_features)
    codes, row_scale, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(rows.to(torch.float16))
    y = torch.ops.bitsandbytes.int8_scaled_mm(codes, layer.weight, row_scale, layer.scale, layer.bias, x.dtype)
    return y.reshape(*x.shape[:-1], layer.out_features)


# Without a card


def start_again(argv: list[str], capability: str) -> int:
    """Run the tool on ``argv`` with the stand-in for the driver in front, and return its exit code."""
    if os.environ.get(STARTED_AGAIN):
        print("torch sees no card although one was put before it; this build of torch asks its driver for something else", file=sys.stderr)
        return 2
    folder = ROOT / "build/fake_cuda"
    folder.mkdir(parents=True, exist_ok=True)
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(DRIVER)
    compiler = os.environ.get("CC", "cc")
    try:
        subprocess.run([compiler, "-w", "-shared", "-fPIC", "-o", library, f"-Wl,-soname,{library.name}", source], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"a C compiler is needed where there is no card ({compiler}: {error}); CC=NAME names another", file=sys.stderr)
        return 2
    paths = ":".join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    changed = {STARTED_AGAIN: capability, "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": paths}
    return subprocess.run([sys.executable, __file__, *argv], env=os.environ | changed).returncode


# What torch asks the CUDA runtime and the driver when tensors have no bytes. All else goes to the real ones, which fail.
# The offsets are those of cudaDeviceProp in CUDA 13: totalGlobalMem, major, minor.
DRIVER = r"""
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
typedef void *P;
static char places[4096];
static P new_place(void) { static int used = 64; used = used < 4000 ? used + 8 : 64; return places + used; }
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *d) { *d = 0; return 0; }
int cudaSetDevice(int d) { return 0; }
int cudaGetDeviceProperties(char *p, int d) {
    memset(p, 0, 1008);
    strcpy(p, "fake card");
    *(size_t *)(p + 288) = 24ul << 30;
    const char *capability = getenv("QLITE_FAKE_CARD");
    *(int *)(p + 360) = capability[0] - '0'; *(int *)(p + 364) = capability[2] - '0';
    return 0;
}
int cudaMemGetInfo(size_t *free, size_t *total) { *free = 23ul << 30; *total = 24ul << 30; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -5; return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaStreamCreateWithPriority(P *s, unsigned f, int p) { *s = new_place(); return 0; }
int cudaStreamQuery(P s) { return 0; }
int cudaStreamSynchronize(P s) { return 0; }
int cudaStreamWaitEvent(P s, P e, unsigned f) { return 0; }
int cudaStreamIsCapturing(P s, int *c) { *c = 0; return 0; }
int cudaStreamGetCaptureInfo(P s, int *c) { *c = 0; return 0; }
int cudaEventCreateWithFlags(P *e, unsigned f) { *e = new_place(); return 0; }
int cudaEventDestroy(P e) { return 0; }
int cudaEventQuery(P e) { return 0; }
int cudaEventRecord(P e, P s) { return 0; }
int cudaEventRecordWithFlags(P e, P s, unsigned f) { return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *active) { *f = 0; *active = 1; return 0; }
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
