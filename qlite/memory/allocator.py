"""What torch's caching allocator reserves on a card for a log of allocations: more than is allocated at any time, by its rounding.

Sizes up to 1 MiB live in the small pool, others in the large one. A request takes the smallest free block that is large enough, which
is split if enough is left; free neighbours become one again. If there is none the card is asked for a segment, which stays.
Expandable segments (PYTORCH_ALLOC_CONF=expandable_segments:True; Linux only) are one segment a pool, grown at its end.

Source: pytorch, c10/cuda/CUDACachingAllocator.cpp (malloc, get_free_block, should_split, try_merge_blocks,
try_allocate_expandable_block) and c10/core/AllocatorConfig.h, for one stream and default settings. What it does when the card is
full (give free segments back, try again) is not followed.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

from qlite.units import MIB

Event = tuple[int, int | None]
"""(key, bytes): allocate so much under that key; (key, None): free it, or nothing if it is older than the log. Keys may come again."""

_BLOCK = 512
_LARGEST_SMALL = 1 * MIB
_SMALL_SEGMENT = 2 * MIB
_LARGE_SEGMENT = 20 * MIB
_SMALLEST_OWN_SEGMENT = 10 * MIB
_SEGMENT_STEP = 2 * MIB


def reserved_bytes(events: Iterable[Event], expandable: bool = False) -> int:
    """Return the bytes that the allocator holds from the card after ``events``: the most it held, as it gives nothing back.

    A step may reserve more when it runs again, since by then more segments are there to choose from: follow a few.
    """
    small, large = _Pool(_SMALL_SEGMENT, expandable), _Pool(_LARGE_SEGMENT, expandable)
    living: dict[int, tuple[_Pool, int, int]] = {}
    for key, size in events:
        if size is None:
            if key in living:
                pool, address, length = living.pop(key)
                pool.free(address, length)
        elif size:  # an empty tensor has no memory
            assert key not in living, f"{key} is allocated twice"
            rounded = -(-size // _BLOCK) * _BLOCK
            pool = small if rounded <= _LARGEST_SMALL else large
            living[key] = (pool, *pool.allocate(rounded))
    return small.reserved + large.reserved


class _Pool:
    """Segments of one kind. Addresses are numbers of the pool's own; the segments lie in the order in which they came."""

    def __init__(self, segment: int, expandable: bool):
        self.reserved = 0
        self._segment, self._expandable = segment, expandable
        # A large block's rest of up to 1 MiB stays with it, unless the segment can grow.
        self._smallest_rest = _BLOCK if expandable or segment == _SMALL_SEGMENT else _LARGEST_SMALL + _BLOCK
        self._top = 0
        self._free: list[tuple[int, int]] = []  # (size, address), sorted: best fit by size, then by address
        self._size_at: dict[int, int] = {}  # the free blocks by where they begin
        self._start_at: dict[int, int] = {}  # and by where they end

    def allocate(self, size: int) -> tuple[int, int]:
        """Return address and true size of a block for ``size`` bytes, a multiple of 512."""
        best = bisect_left(self._free, (size, 0))
        if self._expandable and best + 1 < len(self._free) and sum(self._free[best]) == self._top:
            best += 1  # the block at the end can grow, so it counts as the largest
        if best < len(self._free):
            length, address = self._free[best]
            self._take(address)
        else:
            address, length = self._grow(size)
        if length - size >= self._smallest_rest:
            self._put(address + size, length - size)
            length = size
        return address, length

    def free(self, address: int, size: int) -> None:
        """Take a block back, joined to its free neighbours."""
        if (before := self._start_at.get(address)) is not None:
            size += self._take(before)
            address = before
        if address + size in self._size_at:
            size += self._take(address + size)
        self._put(address, size)

    def _grow(self, size: int) -> tuple[int, int]:
        if self._expandable:
            address = self._start_at.get(self._top, self._top)
            tail = self._take(address) if address < self._top else 0
            new = -(-(size - tail) // self._segment) * self._segment
        else:
            address, tail = self._top + _BLOCK, 0  # a gap, so that segments never join
            is_own = size >= _SMALLEST_OWN_SEGMENT
            new = -(-size // _SEGMENT_STEP) * _SEGMENT_STEP if is_own else self._segment
        self.reserved += new
        self._top = address + tail + new
        return address, tail + new

    def _put(self, address: int, size: int) -> None:
        insort(self._free, (size, address))
        self._size_at[address] = size
        self._start_at[address + size] = address

    def _take(self, address: int) -> int:
        size = self._size_at.pop(address)
        del self._start_at[address + size]
        del self._free[bisect_left(self._free, (size, address))]
        return size
