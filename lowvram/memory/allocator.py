"""Replays allocations through the rules of torch's CUDA caching allocator: what stays reserved.

The rules are those of c10/cuda/CUDACachingAllocator.cpp with default settings and one stream. They are the
same in a version older than torch 2.9 and one newer than 2.13 (commits 001074d25084 and 90fd57e3d7cd); the
constants have their C++ names beside them. By hand: 1, 5 and 30 MiB reserve 2 + 20 + 30 MiB, and 12 MiB more
come out of the 15 that the 5 left free. With expandable segments the three reserve 2 + 40 MiB, since the 30
begin in those 15, and the 12 MiB another page of 20.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lowvram.memory.trace import CACHE_EMPTIED, round_up
from lowvram.units import MiB

ROUNDING = 512  # kMinBlockSize: sizes are multiples of it
SMALL_LIMIT = 1 * MiB  # kSmallSize: requests up to here come from the small pool
SMALL_SEGMENT = 2 * MiB  # kSmallBuffer: its segments, or its pages when expandable
MIDDLE_LIMIT = 10 * MiB  # kMinLargeAlloc: from here on a request gets a segment of its own size
MIDDLE_SEGMENT = 20 * MiB  # kLargeBuffer, now large_segment_size(): segments of smaller ones, or large pages
LARGE_ROUNDING = 2 * MiB  # kRoundLarge: to that size's multiple

NULL = 0  # the address of an empty tensor: torch allocates nothing for it
_SPACE = 1 << 50  # bytes of addresses for each pool, more than any card has
_SMALL_ORIGIN, _LARGE_ORIGIN = _SPACE, 2 * _SPACE


class OutOfBudgetError(Exception):
    """A request does not fit the budget, even after everything cached was given back."""


class Block(NamedTuple):
    """A piece of reserved memory. Pieces of one segment touch each other, fixed segments do not."""

    address: int
    size_bytes: int
    free: bool


class _Pool:
    """The free blocks of one size class: sorted for best fit, and known by both ends for merging.

    An expandable pool is one segment. `gaps` are its addresses without memory behind them: all after its end,
    and those whose pages were given back.
    """

    def __init__(self, small: bool, expandable: bool) -> None:
        self.origin = _SMALL_ORIGIN if small else _LARGE_ORIGIN
        self.page_bytes = SMALL_SEGMENT if small else MIDDLE_SEGMENT
        # should_split: in the large pool the rest of a fixed segment must exceed kSmallSize to be split off.
        self.least_rest_bytes = ROUNDING if small or expandable else SMALL_LIMIT + ROUNDING
        self.by_size: list[tuple[int, int]] = []  # (size, address) of free blocks
        self.sizes: dict[int, int] = {}  # address -> size, of free blocks
        self.starts: dict[int, int] = {}  # end -> address, of free blocks
        self.segments: dict[int, int] = {}  # address -> size, of fixed segments
        self.gaps: dict[int, int] = {self.origin: _SPACE} if expandable else {}  # address -> size
        self._next_segment = self.origin

    def best_fit(self, size: int) -> int | None:
        """get_free_block: the address of the smallest that fits; of equals, the lowest.

        A free block in front of a gap counts as large as it could grow, so the next larger one is preferred.
        """
        free, gaps = self.by_size, self.gaps
        at = bisect_left(free, (size,))
        if at == len(free):
            return None
        if gaps:
            while at + 1 < len(free) and self._room(free[at + 1]) < self._room(free[at]):
                at += 1
        return free[at][1]

    def _room(self, block: tuple[int, int]) -> int:
        size, address = block
        return size + self.gaps.get(address + size, 0)

    def take(self, address: int, size: int) -> int:
        """Use the free block at `address` for `size` bytes; how many it really takes."""
        whole = self._remove(address)
        rest = whole - size
        if rest < self.least_rest_bytes:
            return whole
        self._insert(address + size, rest)
        return size

    def put(self, address: int, size: int) -> None:
        """Take back a block and merge it with free neighbours."""
        end = address + size
        if address in self.starts:
            address = self.starts[address]
            self._remove(address)
        if end in self.sizes:
            end += self._remove(end)
        self._insert(address, end - address)

    def _insert(self, address: int, size: int) -> None:
        self.sizes[address] = size
        self.starts[address + size] = address
        insort(self.by_size, (size, address))

    def _remove(self, address: int) -> int:
        size = self.sizes.pop(address)
        del self.starts[address + size]
        self.by_size.pop(bisect_left(self.by_size, (size, address)))
        return size

    def add_segment(self, size: int) -> int:
        """A new fixed segment. cudaMalloc's addresses cannot be known; ours rise."""
        address = self._next_segment
        self._next_segment += size + ROUNDING  # apart, so that two segments never merge
        self.segments[address] = size
        self._insert(address, size)
        return address

    def growth(self, size: int) -> int:
        """find_expandable_block: the lowest address where free blocks and gaps together hold `size`."""
        for gap in sorted(self.gaps):
            start = end = self.starts.get(gap, gap)
            while end - start < size and (end in self.sizes or end in self.gaps):
                end += self.sizes.get(end) or self.gaps[end]
            if end - start >= size:
                break
        return start  # the last gap holds everything

    def map(self, gap: int, size: int) -> None:
        """Put memory behind the first `size` bytes of a gap."""
        left = self.gaps.pop(gap) - size
        if left:
            self.gaps[gap + size] = left
        self.put(gap, size)

    def give_back(self) -> int:
        """release_blocks: drop whole free segments, or whole free pages; how many bytes."""
        before = sum(self.sizes.values())
        for address, size in list(self.sizes.items()):
            if self.gaps:
                self._unmap(address, size)
            elif self.segments.get(address) == size:
                del self.segments[address]
                self._remove(address)
        return before - sum(self.sizes.values())

    def _unmap(self, address: int, size: int) -> None:
        start = self.origin + round_up(address - self.origin, self.page_bytes)
        end = address + size - (address + size - self.origin) % self.page_bytes
        if start >= end:
            return
        self._remove(address)
        for piece, piece_end in ((address, start), (end, address + size)):
            if piece < piece_end:
                self._insert(piece, piece_end - piece)
        first = next((gap for gap, n_bytes in self.gaps.items() if gap + n_bytes == start), start)
        self.gaps[first] = end + self.gaps.pop(end, 0) - first


class CachingAllocator:
    """Two pools of cached blocks, and the bytes that torch.cuda's counters of the same names would show.

    Without a budget nothing is ever given back: `peak_reserved_bytes` then is enough for the program to run.
    With one, a request beyond it gives back what is cached and is tried again, as when the driver refuses.
    The budget is what the card has for torch, without the context and other processes. (Under
    set_per_process_memory_fraction torch refuses expandable requests by their `segment_bytes`, though the
    pages they need may be fewer or more.)
    """

    def __init__(self, expandable: bool = False, budget_bytes: int | None = None) -> None:
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.allocated_bytes = self.peak_allocated_bytes = 0  # with rests too small to be split off
        self._small, self._large = _Pool(True, expandable), _Pool(False, expandable)
        self._live: dict[int, int] = {}  # address -> size
        self._budget_bytes = budget_bytes

    def allocate(self, n_bytes: int) -> int:
        """The address of a block of at least `n_bytes`.

        Raises:
            OutOfBudgetError: torch would report that the card is out of memory.
        """
        if not n_bytes:
            return NULL
        size = -(-n_bytes // ROUNDING) * ROUNDING
        pool = self._small if size <= SMALL_LIMIT else self._large
        address = pool.best_fit(size)
        if address is None:
            address = self._obtain(pool, size)
        self._live[address] = size = pool.take(address, size)
        self.allocated_bytes += size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return address

    def release(self, address: int) -> None:
        if address != NULL:
            size = self._live.pop(address)
            self.allocated_bytes -= size
            (self._small if address < _LARGE_ORIGIN else self._large).put(address, size)

    def empty_cache(self) -> None:
        """release_cached_blocks: give back what can be, as on a refusal by the driver."""
        self.reserved_bytes -= self._small.give_back() + self._large.give_back()

    def blocks(self) -> list[Block]:
        """Everything reserved, by address."""
        free = [(a, size, True) for pool in (self._small, self._large) for a, size in pool.sizes.items()]
        live = [(a, size, False) for a, size in self._live.items()]
        return [Block(*block) for block in sorted(free + live)]

    def _obtain(self, pool: _Pool, size: int) -> int:
        grow = self._map_pages if pool.gaps else self._new_segment
        address = grow(pool, size)
        if address is None:
            self.empty_cache()
            address = grow(pool, size)
        if address is None:
            raise OutOfBudgetError(f"{size} bytes beyond {self.reserved_bytes} of {self._budget_bytes}")
        return address

    def _new_segment(self, pool: _Pool, size: int) -> int | None:
        segment = segment_bytes(size)
        return pool.add_segment(segment) if self._reserve(segment) else None

    def _map_pages(self, pool: _Pool, size: int) -> int | None:
        """try_allocate_expandable_block: gap after gap, until one free block holds `size`."""
        address = pool.growth(size)
        while (mapped := pool.sizes.get(address, 0)) < size:
            gap = address + mapped
            pages = round_up(min(size - mapped, pool.gaps[gap]), pool.page_bytes)
            if not self._reserve(pages):
                return None  # what was mapped so far stays, free
            pool.map(gap, pages)
        return address

    def _reserve(self, n_bytes: int) -> bool:
        reserved = self.reserved_bytes + n_bytes
        if self._budget_bytes is not None and reserved > self._budget_bytes:
            return False
        self.reserved_bytes = reserved
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, reserved)
        return True


def segment_bytes(size: int) -> int:
    """get_allocation_size: of the fixed segment that is reserved for a request of `size` bytes."""
    if size <= SMALL_LIMIT:
        return SMALL_SEGMENT
    return MIDDLE_SEGMENT if size < MIDDLE_LIMIT else round_up(size, LARGE_ROUNDING)


def replay_reserved(events: Iterable[int], sizes: Sequence[int], expandable: bool = False) -> int:
    """Peak reserved bytes of a trace's events (see `Trace`) on an endless card."""
    allocator = CachingAllocator(expandable)
    _replay(allocator, events, sizes)
    return allocator.peak_reserved_bytes


def replay_allocated(events: Sequence[int], sizes: Sequence[int], start: int = 0, repeats: int = 1) -> int:
    """Peak of what the allocator calls allocated: it counts a block whole when it is not worth splitting.

    Args:
        start: the event before which the peak is reset and the cache emptied.
        repeats: how often what comes from there on happens.
    """
    allocator = CachingAllocator()
    addresses = _replay(allocator, events[:start], sizes)
    peak = 0
    for _ in range(repeats):
        allocator.empty_cache()
        allocator.peak_allocated_bytes = allocator.allocated_bytes
        _replay(allocator, events[start:], sizes, addresses)
        peak = max(peak, allocator.peak_allocated_bytes)
    return peak


def fits(events: Iterable[int], sizes: Sequence[int], budget_bytes: int, expandable: bool = False) -> bool:
    """Whether the events run where torch can reserve no more than `budget_bytes`.

    It can be true below `replay_reserved`, by giving back cached memory and asking again, which costs time:
    good for saying what could still run, not for planning.
    """
    try:
        _replay(CachingAllocator(expandable, budget_bytes), events, sizes)
    except OutOfBudgetError:
        return False
    return True


def _replay(
    allocator: CachingAllocator,
    events: Iterable[int],
    sizes: Sequence[int],
    addresses: dict[int, int] | None = None,
) -> dict[int, int]:
    """Returns where what is still alive lies; `addresses` says so of what is alive before."""
    addresses = {} if addresses is None else addresses
    for event in events:
        if event > 0:
            addresses[event] = allocator.allocate(sizes[event - 1])
        elif event == CACHE_EMPTIED:
            allocator.empty_cache()
        else:
            allocator.release(addresses.pop(-event))
    return addresses
