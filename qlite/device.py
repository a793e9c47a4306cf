"""The device a run computes on: chosen, seeded, measured. The one owner of ``torch.cuda`` and of NVML.

Every function has a CPU path, so that all else can be written once.
"""

import ctypes
import gc
import hashlib
import importlib
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

import psutil
import torch

from qlite.cpu_products import has_bfloat16_products, multiply_in_float32
from qlite.errors import MachineError, RecipeError
from qlite.units import MIB

# What is said in a plain RuntimeError: by torch on the host (Linux, Windows), by C++ itself, by a card's libraries and its driver.
OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc"
    r"|[A-Z]+_STATUS_ALLOC_FAILED|(CUDA|HIP)( driver)? error: out of memory"
)


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
    spilled: int = 0
    """Bytes that ``reserved`` counts and that lie in host memory: at least so many (see ``spilled_bytes``)."""
    terms: dict[str, int] | None = None
    """Bytes by term (the names of memory.terms, in their order) at the peak of the last step that was followed tensor by tensor."""
    planned: int | None = None
    """Tensor bytes that the plan says a training step takes at most."""


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
    else:
        multiply_in_float32()
    return device


def is_current(device: torch.device) -> bool:
    """Return whether what this thread launches runs on ``device``: torch looks where a tensor lies, Triton does not."""
    return device.type != "cuda" or device.index in (None, torch.cuda.current_device())


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
    return f"CPU, {torch.get_num_threads()} threads{'' if has_bfloat16_products() else ', bfloat16 products in float32'}"


def architecture(device: torch.device) -> str:
    """Return what decides which machine code runs on ``device``, and how well: instructions, threads, the card."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device}: {properties.name} {properties.major}.{properties.minor}"
    try:
        flags = re.search(r"^(flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        flags = None
    instructions = flags[0] if flags else platform.processor()
    return f"{platform.machine()} {instructions} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory that the device has: a card's own, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process could still take: of a card, whatever runs on it; of the machine, without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def supports_paging(device: torch.device) -> bool:
    """Return whether optimizer state can live in CUDA managed memory, which the driver pages to the host."""
    return device.type == "cuda"


def spilled_bytes(reserved: int, driver: int | None, total: int) -> int:
    """Return how many of ``reserved``, the bytes that torch has reserved, cannot lie on the card; 0 without a spill.

    They are in host memory if they are more than the card has (``total``), or more than is in use on it by the count of
    the driver (``driver``, None if it is not known), which tells physical memory. The true number can be larger: other
    programs and the CUDA context have their share of what is in use.
    """
    spilled = reserved - min(total, total if driver is None else driver)
    # The counts are not read at one instant, and each rounds in its own pages.
    return spilled if spilled > 64 * MIB else 0


def overflows_to_host() -> bool:
    """Return whether this system's NVIDIA driver (WDDM: Windows, and WSL on it) puts what a full card cannot hold into host memory."""
    return platform.system() == "Windows" or "microsoft" in platform.release().lower()


class MemoryMeter:
    """Reads memory in use on one device, and the peak since the meter was made or ``reset_peak`` was called."""

    def __init__(self, device: torch.device):
        self.device = device
        self._process = psutil.Process()
        self._nvml = _nvml_handle(device)
        self._overflows = overflows_to_host()
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
            reserved, driver = stats["reserved_bytes"]["all"]["current"], self._nvml() if self._nvml else None
            total = total_memory(self.device)
            return MemoryUse(
                used=stats["allocated_bytes"]["all"]["current"],
                peak=stats["allocated_bytes"]["all"]["peak"],
                total=total,
                reserved=reserved,
                driver=driver,
                # Elsewhere an allocation fails instead, so a figure would be a false alarm.
                spilled=spilled_bytes(reserved, driver, total) if self._overflows else 0,
            )
        used = self._process.memory_info().rss
        # The kernel's own high-water mark would include loading; this peak is over the meter's own readings.
        self._sampled_peak = max(self._sampled_peak, used)
        return MemoryUse(used=used, peak=self._sampled_peak, total=total_memory(self.device))


def peak_process_bytes() -> int:
    """Return the largest resident size this process ever had, or its present one where the system keeps no mark."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux: what getrusage tells there is never less than what whoever started this process had at that moment.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if found:
            return int(found[1]) * 1024
    try:
        resource = importlib.import_module("resource")
    except ImportError:
        return info.rss
    scale = 1 if platform.system() == "Darwin" else 1024
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


@contextmanager
def settings_kept() -> Iterator[None]:
    """Leave torch's number of threads and its generators as they are found."""
    threads, cards = torch.get_num_threads(), range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=cards):
        try:
            yield
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


def give_back_all() -> None:
    """Give back what nothing uses any more: to the driver what torch keeps of every card, to the kernel what glibc keeps."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    give_back_freed(torch.device("cpu"))


class RandomState:
    """The state of torch's generators as it was made: the CPU's, and that of ``device`` where it has one."""

    def __init__(self, device: torch.device):
        self._cards = [device] if device.type == "cuda" else []
        self._states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(card) for card in self._cards)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the numbers again that were drawn after this state; what is drawn outside of the context does not notice."""
        with torch.random.fork_rng(devices=self._cards):
            torch.set_rng_state(self._states[0])
            for card, state in zip(self._cards, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, card)
            yield


@cache
def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except OSError:  # not Linux, or not glibc
        return None


def keep_freed_memory() -> None:
    """Let glibc's allocator keep large freed blocks instead of handing them back to the kernel and faulting them in again.

    Activations are large, and each step frees and takes the same ones: on CPU a training step is 1.2 times as fast with this
    (tools/LOG.md). What is kept has holes; ``give_back_freed`` closes them between passes. Elsewhere than on Linux nothing is done.
    """
    libc = _libc()
    if libc is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def give_back_freed(device: torch.device) -> None:
    """Hand what glibc keeps of freed memory back to the kernel, on a CPU: between passes its holes are as large as the tensors.

    Measured in tools/LOG.md; with ``keep_freed_memory`` alone a process grows to 1.2 times as much. Elsewhere nothing is done.
    """
    if device.type == "cpu" and _libc() is not None:
        _libc().malloc_trim(0)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether ``error`` says that an allocation failed, on the device or on the host, and nothing worse."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


def out_of_memory_words(error: BaseException) -> str:
    """Return what happened, and what to lower, for an error of which ``is_out_of_memory`` is true."""
    first = (str(error) or "no more to be had").splitlines()[0]
    return f"out of memory: {first}\nLower train.micro_batch (and raise train.accumulation), train.tokens or memory.loss_chunk"


def free_cached(device: torch.device) -> None:
    """Give back what nothing uses: objects that only point at each other, and the blocks that torch's allocator keeps on a card."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Attempt:
    """A ``with`` block that may run out of memory: afterwards ``ran_out`` says whether it did. Any other error passes through.

    The block that failed leaves nothing behind: an error holds the frames that it passed, and they all their tensors, so the
    error is let go of before the next statement.
    """

    def __init__(self):
        self.ran_out = False

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        self.ran_out = is_out_of_memory(error)
        if self.ran_out:
            error.__traceback__ = error.__context__ = error.__cause__ = None
        return self.ran_out


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
