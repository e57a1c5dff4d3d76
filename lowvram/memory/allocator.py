"""Replays allocations through the rules of torch's CUDA caching allocator: what stays reserved."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

from lowvram.units import MiB

ROUNDING = 512
SMALL_LIMIT = 1 * MiB  # requests up to here come from small segments
SMALL_SEGMENT = 2 * MiB
MIDDLE_LIMIT = 10 * MiB  # larger requests get a segment of their own
MIDDLE_SEGMENT = 20 * MiB
LARGE_ROUNDING = 2 * MiB


@dataclass(slots=True, eq=False)
class _Block:
    size: int
    order: int  # ties break by age, so that a replay is deterministic
    small: bool
    before: _Block | None = None  # neighbours within one segment
    after: _Block | None = None
    free: bool = False


class CachingAllocator:
    """Best fit within two pools; free neighbours merge; segments are never given back.

    The rules are those of c10/cuda/CUDACachingAllocator.cpp. With `expandable` each pool is one segment that
    grows at its end by whole pages (2 MiB small, 20 MiB large) instead of many of fixed size.
    """

    def __init__(self, expandable: bool = False) -> None:
        self._expandable = expandable
        self._last: dict[bool, _Block | None] = {True: None, False: None}
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._count = 0

    def allocate(self, n_bytes: int) -> _Block:
        size = max(ROUNDING, -(-n_bytes // ROUNDING) * ROUNDING)
        small = size <= SMALL_LIMIT
        block = self._take(size, small)
        if block is None:
            block = self._grow(size, small) if self._expandable else self._new_segment(size, small)
        self._split(block, size)
        block.free = False
        return block

    def release(self, block: _Block) -> None:
        block.free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._remove(neighbour)
                left, right = (neighbour, block) if neighbour is block.before else (block, neighbour)
                if self._last[block.small] is right:
                    self._last[block.small] = left
                block = _merge(left, right)
        self._insert(block)

    def empty_cache(self) -> None:
        """Give back the segments in which nothing lives."""
        for small, pool in self._free.items():
            whole = [entry for entry in pool if entry[2].before is None and entry[2].after is None]
            self.reserved_bytes -= sum(entry[0] for entry in whole)
            self._free[small] = [entry for entry in pool if entry not in whole]

    def _take(self, size: int, small: bool) -> _Block | None:
        pool = self._free[small]
        at = bisect_left(pool, (size, -1))
        return pool.pop(at)[2] if at < len(pool) else None

    def _new_segment(self, size: int, small: bool) -> _Block:
        if small:
            segment = SMALL_SEGMENT
        elif size < MIDDLE_LIMIT:
            segment = MIDDLE_SEGMENT
        else:
            segment = -(-size // LARGE_ROUNDING) * LARGE_ROUNDING
        self._reserve(segment)
        return self._block(segment, small)

    def _grow(self, size: int, small: bool) -> _Block:
        """Map pages behind the pool's last block, which is used too when it is free."""
        last, page = self._last[small], SMALL_SEGMENT if small else MIDDLE_SEGMENT
        reuse = last is not None and last.free
        missing = size - (last.size if last is not None and reuse else 0)
        pages = -(-missing // page) * page
        self._reserve(pages)
        if last is not None and reuse:
            self._remove(last)
            last.size += pages
            return last
        block = self._block(pages, small)
        if last is not None:
            last.after, block.before = block, last
        self._last[small] = block
        return block

    def _reserve(self, n_bytes: int) -> None:
        self.reserved_bytes += n_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _split(self, block: _Block, size: int) -> None:
        rest = block.size - size
        if rest < ROUNDING or (not block.small and rest <= SMALL_LIMIT):
            return
        tail = self._block(rest, block.small)
        tail.before, tail.after, tail.free = block, block.after, True
        if block.after is not None:
            block.after.before = tail
        block.after, block.size = tail, size
        if self._last[block.small] is block:
            self._last[block.small] = tail
        self._insert(tail)

    def _block(self, size: int, small: bool) -> _Block:
        self._count += 1
        return _Block(size, self._count, small)

    def _insert(self, block: _Block) -> None:
        insort(self._free[block.small], (block.size, block.order, block))

    def _remove(self, block: _Block) -> None:
        pool = self._free[block.small]
        pool.pop(bisect_left(pool, (block.size, block.order)))


def _merge(left: _Block, right: _Block) -> _Block:
    left.size += right.size
    left.after = right.after
    if right.after is not None:
        right.after.before = left
    left.free = True
    return left


def replay_reserved(events: Iterable[int], sizes: list[int], expandable: bool = False) -> int:
    """Peak reserved bytes of a trace's events (+i allocates sizes[i-1], -i frees it)."""
    allocator = CachingAllocator(expandable)
    blocks: dict[int, _Block] = {}
    for event in events:
        if event > 0:
            blocks[event] = allocator.allocate(sizes[event - 1])
        else:
            allocator.release(blocks.pop(-event))
    return allocator.peak_reserved_bytes


def replay_allocated(events: list[int], sizes: list[int], start: int = 0, repeats: int = 1) -> int:
    """Peak of what the allocator calls allocated: it counts a block whole when it is not worth splitting.

    Args:
        start: the event before which the peak is reset and the cache emptied.
        repeats: how often what comes from there on happens.
    """
    allocator = CachingAllocator()
    blocks: dict[int, _Block] = {}
    _peak_allocated(allocator, blocks, events[:start], sizes)
    peak = 0
    for _ in range(repeats):
        allocator.empty_cache()
        peak = max(peak, _peak_allocated(allocator, blocks, events[start:], sizes))
    return peak


def _peak_allocated(
    allocator: CachingAllocator, blocks: dict[int, _Block], events: Iterable[int], sizes: list[int]
) -> int:
    live = peak = sum(block.size for block in blocks.values())
    for event in events:
        if event > 0:
            blocks[event] = allocator.allocate(sizes[event - 1])
            live += blocks[event].size
            peak = max(peak, live)
        else:
            block = blocks.pop(-event)
            live -= block.size
            allocator.release(block)
    return peak
