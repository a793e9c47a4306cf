"""qlite: a quantised, low-memory LoRA trainer for one consumer graphics card."""

import logging
import os
import sys

__version__ = "0.1.0"

# All of this must be set before torch and bitsandbytes are imported.
# OpenMP's threads spin while they wait for each other. By default they spin for so long that on a CPU which something
# else uses too every wait costs a time slice: a token decoded beside one busy program took 2.3 s, with a short spin 0.3 s
# (alone: 0.10 and 0.11 s; tools/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# bitsandbytes warns, when it is imported, that an optional CPU kernel package is missing; qlite does not use it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# torch's allocator on a card: one growing segment a pool instead of many that no large tensor fits into. Linux only; a user's own
# settings, under either of its names, stand.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
