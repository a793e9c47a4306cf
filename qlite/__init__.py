"""qlite: a quantised, low-memory LoRA trainer for one consumer graphics card."""

import logging

__version__ = "0.1.0"

# bitsandbytes warns, when it is imported, that an optional CPU kernel package is missing; qlite does not use it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
