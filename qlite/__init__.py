"""qlite: a quantised, low-memory LoRA trainer for one consumer graphics card.

from qlite import Recipe, train, plan, export, generate

The verbs of the command line as functions: what they return shows itself, what is wrong is raised as a QliteError.
"""

import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what editors read; what runs is ``__getattr__``, for torch is imported when it is needed
    from qlite.analyze import analyze as analyze
    from qlite.errors import QliteError as QliteError
    from qlite.evaluate import evaluate as evaluate
    from qlite.export import export as export
    from qlite.generate import generate as generate
    from qlite.plan import plan as plan
    from qlite.preview import preview as preview
    from qlite.recipe.schema import Recipe as Recipe
    from qlite.report import report as report
    from qlite.serving.answer import Sampling as Sampling
    from qlite.train import train as train
    from qlite.training.merging import Merge as Merge

__version__ = "0.1.0"

# Each verb is a module that can be called (qlite/verb.py): whoever imports it, and in which order, ``qlite.train`` stays the same thing.
VERBS = ("train", "plan", "preview", "export", "generate", "evaluate", "report", "analyze")
PLACES = {"Recipe": "recipe.schema", "QliteError": "errors", "Sampling": "serving.answer", "Merge": "training.merging"}
__all__ = [*PLACES, *VERBS]

# All of this must be set before torch and bitsandbytes are imported.
# OpenMP's threads spin while they wait for each other. By default they spin for so long that on a CPU which something
# else uses too every wait costs a time slice: a token decoded beside one busy program took 2.3 s, with a short spin 0.3 s
# (alone: 0.10 and 0.11 s; tools/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Tensors of 2 MiB and more in huge pages, where the kernel has them for whoever asks: a step faults in what the last one gave back, 4 KiB
# at a time without them, and takes 1.1 times as long (tools/LOG.md). It is torch's own switch, for CPUs; elsewhere than on Linux unused.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# bitsandbytes warns, when it is imported, that an optional CPU kernel package is missing; qlite does not use it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# torch's allocator on a card: one growing segment a pool instead of many that no large tensor fits into. Linux only; a user's own
# settings, under either of its names, stand.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def __getattr__(name: str) -> object:
    if name in VERBS:
        return importlib.import_module(f"qlite.{name}")
    if name in PLACES:
        return getattr(importlib.import_module(f"qlite.{PLACES[name]}"), name)
    raise AttributeError(f"module 'qlite' has no attribute {name!r}; it has: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
