"""qlite: a quantised, low-memory LoRA trainer for one consumer graphics card."""

import logging
import os

__version__ = "0.1.0"

# Both must be set before torch and bitsandbytes are imported.
# OpenMP's threads spin while they wait for each other; on a CPU that something else uses too, each wait then costs a
# time slice: decoding beside one other busy process took 6.7 s a token spinning and 0.13 s sleeping (tools/LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# bitsandbytes warns, when it is imported, that an optional CPU kernel package is missing; qlite does not use it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
