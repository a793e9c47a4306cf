"""The device a run computes on: chosen, seeded, measured. The one owner of ``torch.cuda`` and of NVML.

Every function has a CPU path, so that all else can be written once.
"""

import ctypes
import hashlib
import importlib
import os
import re
from dataclasses import dataclass

import psutil
import torch

from qlite.errors import MachineError, RecipeError


@dataclass(frozen=True)
class MemoryUse:
    """Bytes in use right now. On a GPU ``used`` is what torch has allocated; on CPU it is the process's memory (RSS).

    ``reserved`` and ``driver`` are None on CPU: torch's caching allocator and the driver's own figure for the whole
    card (NVML: all processes and the CUDA context).
    """

    used: int
    peak: int
    total: int
    reserved: int | None = None
    driver: int | None = None


def pick_device(name: str) -> torch.device:
    """Return the device called ``name``: "auto" (first CUDA card, else CPU), "cpu", "cuda" or "cuda:1".

    Raises:
        MachineError: a CUDA device is asked for and there is none of that number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise RecipeError(f'device "{name}": should be "auto", "cpu", "cuda" or "cuda:1"')
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise MachineError(f'device "{name}": torch {torch.__version__} sees {count} CUDA devices; use "auto" or "cpu"')
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def set_threads(threads: int) -> int:
    """Let torch's CPU kernels use ``threads`` threads (0: leave as it is) and return how many are in use.

    The number is part of a run's identity: another number sums in another order, so the last bits differ.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def describe(device: torch.device) -> str:
    """Return the device in words: "NVIDIA GeForce RTX 4090 (23.6 GiB)" or "CPU, 2 threads"."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} ({properties.total_memory / 1024**3:.1f} GiB)"
    return f"CPU, {torch.get_num_threads()} threads"


def supports_paging(device: torch.device) -> bool:
    """Return whether optimizer state can live in CUDA managed memory, which the driver pages to the host."""
    return device.type == "cuda"


class MemoryMeter:
    """Reads memory in use on one device, and the peak since the meter was made or ``reset_peak`` was called."""

    def __init__(self, device: torch.device):
        self.device = device
        self._process = psutil.Process()
        self._nvml = _nvml_handle(device)
        self._sampled_peak = 0
        self.reset_peak()

    def reset_peak(self) -> None:
        """Start the peak anew at what is in use now."""
        self._sampled_peak = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> MemoryUse:
        """Return the memory in use. Reads counters only: no synchronisation with the device."""
        if self.device.type == "cuda":
            stats = torch.cuda.memory_stats_as_nested_dict(self.device)
            return MemoryUse(
                used=stats["allocated_bytes"]["all"]["current"],
                peak=stats["allocated_bytes"]["all"]["peak"],
                total=torch.cuda.get_device_properties(self.device).total_memory,
                reserved=stats["reserved_bytes"]["all"]["current"],
                driver=self._nvml() if self._nvml else None,
            )
        used = self._process.memory_info().rss
        # The kernel's own high-water mark would include loading; this peak is over the meter's own readings.
        self._sampled_peak = max(self._sampled_peak, used)
        return MemoryUse(used=used, peak=self._sampled_peak, total=psutil.virtual_memory().total)


def peak_process_bytes() -> int:
    """Return the largest resident size this process ever had, or its present one where the system keeps no mark."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    try:
        resource = importlib.import_module("resource")
    except ImportError:
        return info.rss
    scale = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def seed_all(*parts: int) -> None:
    """Seed torch's generators, on every device, from ``parts``: (seed, step) makes a step's dropout a function of both.

    So a resumed run needs no saved generator state, and an evaluation in between moves no later draw.
    """
    torch.manual_seed(mix_seed(*parts))


def mix_seed(*parts: int) -> int:
    """Return one well-mixed 32-bit seed for ``parts``: the CPU generator reads no more than 32 bits."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def keep_freed_memory() -> None:
    """Let glibc's allocator keep large freed blocks instead of handing them back to the kernel and faulting them in again.

    Activations are large, and each step frees and takes the same ones: on CPU a training step is 1.2 times as fast with
    this, at the same peak (tools/LOG.md). Elsewhere than on Linux nothing is done.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
    except (OSError, AttributeError):
        return


def _nvml_handle(device: torch.device):
    """Return a function giving the bytes in use on the whole card by the driver's count, or None without NVML."""
    if device.type != "cuda":
        return None
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        # By UUID: NVML numbers all cards, torch only those in CUDA_VISIBLE_DEVICES.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
        return lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used
    except Exception:  # NVML is a convenience: any failure of it only costs the driver's figure.
        return None
