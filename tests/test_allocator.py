"""The allocator's replay against its rules, a slow model of them, and invariants over random programs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowvram.memory.allocator import (
    NULL,
    Block,
    CachingAllocator,
    OutOfBudgetError,
    fits,
    replay_reserved,
    segment_bytes,
)
from lowvram.memory.trace import CACHE_EMPTIED
from lowvram.units import KiB, MiB

Program = list[int]  # a positive number allocates that many bytes, -k frees the k-th of those alive, around

_EDGES = [1, 512, 513, MiB, MiB + 1, 10 * MiB - 512, 10 * MiB - 511, 10 * MiB, 10 * MiB + 1, 20 * MiB]
_SIZES = st.one_of(
    st.integers(1, MiB),
    st.integers(1, 10).map(lambda n: n * MiB),
    st.integers(1, 120).map(lambda n: n * 512 * KiB),
    st.integers(MiB, 60 * MiB),
    st.sampled_from(_EDGES),
)
PROGRAMS = st.lists(st.one_of(_SIZES, st.integers(-30, -1)), min_size=1, max_size=80)
both_modes = pytest.mark.parametrize("expandable", [False, True])


def _events(program: Program) -> tuple[list[int], list[int]]:
    events: list[int] = []
    sizes: list[int] = []
    alive: list[int] = []
    for number in program:
        if number > 0:
            sizes.append(number)
            alive.append(len(sizes))
            events.append(len(sizes))
        elif alive:
            events.append(-alive.pop(number % len(alive)))
    return events, sizes


def _run(allocator: CachingAllocator, program: Program) -> Iterator[tuple[int, dict[int, int]]]:
    """After each event: what happened, and the address of each live request."""
    events, sizes = _events(program)
    live: dict[int, int] = {}
    for event in events:
        if event > 0:
            live[event] = allocator.allocate(sizes[event - 1])
        else:
            allocator.release(live.pop(-event))
        yield event, live


def _rounded(n_bytes: int) -> int:
    return (n_bytes + 511) // 512 * 512


def _segments(allocator: CachingAllocator) -> list[list[Block]]:
    """Blocks that touch each other, as torch's snapshot groups them."""
    segments: list[list[Block]] = []
    for block in allocator.blocks():
        if segments and sum(segments[-1][-1][:2]) == block.address:
            segments[-1].append(block)
        else:
            segments.append([block])
    return segments


# --- the rules, by hand


def test_worked_example() -> None:
    """1, 5, 30 and 12 MiB: the example of the module's first lines."""
    for expandable, expected in ((False, [2, 22, 52, 52]), (True, [2, 22, 42, 62])):
        allocator = CachingAllocator(expandable)
        for size, reserved in zip((1, 5, 30, 12), expected, strict=True):
            allocator.allocate(size * MiB)
            assert allocator.reserved_bytes == reserved * MiB


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (512, 2 * MiB),
        (MiB, 2 * MiB),
        (MiB + 512, 20 * MiB),
        (10 * MiB - 512, 20 * MiB),
        (10 * MiB, 10 * MiB),
        (10 * MiB + 512, 12 * MiB),
        (31 * MiB, 32 * MiB),
    ],
)
def test_segments(size: int, segment: int) -> None:
    assert segment_bytes(size) == segment
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert allocator.reserved_bytes == segment


@pytest.mark.parametrize(
    ("expandable", "size", "taken"),
    [
        (False, 19 * MiB, 20 * MiB),  # rest of 1 MiB in the large pool: not split off
        (False, 19 * MiB - 1, 20 * MiB),
        (False, 19 * MiB - 512, 19 * MiB - 512),
        (True, 19 * MiB, 19 * MiB),
        (True, 20 * MiB - 512, 20 * MiB - 512),
        (False, 600 * KiB, 600 * KiB),
    ],
)
def test_split(expandable: bool, size: int, taken: int) -> None:
    allocator = CachingAllocator(expandable)
    allocator.release(allocator.allocate(20 * MiB))
    address = allocator.allocate(size)
    assert allocator.allocated_bytes == taken
    allocator.release(address)
    assert (allocator.allocated_bytes, allocator.peak_allocated_bytes) == (0, 20 * MiB)


@both_modes
def test_empty_tensor_costs_nothing(expandable: bool) -> None:
    allocator = CachingAllocator(expandable)
    address = allocator.allocate(0)
    allocator.release(address)
    assert (address, allocator.peak_reserved_bytes, allocator.blocks()) == (NULL, 0, [])


@both_modes
def test_smallest_then_lowest_address_is_taken(expandable: bool) -> None:
    """Of three free holes of 4, 3 and 3 MiB the first of the smaller ones, whatever was freed first."""
    allocator = CachingAllocator(expandable)
    sizes = [4, 2, 3, 2, 3, 2]
    addresses = [allocator.allocate(size * MiB) for size in sizes]
    for hole in (4, 2, 0):
        allocator.release(addresses[hole])
    assert [allocator.allocate(3 * MiB) for _ in range(3)] == [addresses[2], addresses[4], addresses[0]]


def test_block_that_can_grow_is_spared() -> None:
    """A hole of 8 MiB is preferred to the 5 MiB in front of the unmapped end, though those fit better."""
    allocator = CachingAllocator(expandable=True)
    hole, _ = allocator.allocate(8 * MiB), allocator.allocate(7 * MiB)
    allocator.release(hole)
    assert allocator.allocate(4 * MiB) == hole
    assert allocator.reserved_bytes == 20 * MiB


def test_both_pools_are_apart() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(30 * MiB))
    allocator.allocate(MiB)
    assert allocator.reserved_bytes == 32 * MiB


# --- invariants


@both_modes
@settings(max_examples=150, deadline=None)
@given(program=PROGRAMS)
def test_invariants(expandable: bool, program: Program) -> None:
    allocator = CachingAllocator(expandable)
    _, sizes = _events(program)
    reserved = 0
    for _, live in _run(allocator, program):
        rounded = {address: _rounded(sizes[event - 1]) for event, address in live.items()}
        assert sum(rounded.values()) <= allocator.allocated_bytes <= allocator.reserved_bytes
        assert reserved <= allocator.reserved_bytes == allocator.peak_reserved_bytes
        reserved = allocator.reserved_bytes
        _check_layout(allocator, rounded, expandable)
    assert replay_reserved(*_events(program), expandable) == reserved  # again the same


def _check_layout(allocator: CachingAllocator, rounded: dict[int, int], expandable: bool) -> None:
    blocks = allocator.blocks()
    assert all(a.address + a.size_bytes <= b.address for a, b in pairwise(blocks))
    taken = {block.address: block.size_bytes for block in blocks if not block.free}
    assert taken.keys() == rounded.keys()
    assert all(0 <= taken[a] - size <= (0 if expandable else MiB) for a, size in rounded.items())
    segments = _segments(allocator)
    assert sum(b.size_bytes for b in blocks) == allocator.reserved_bytes
    assert not any(a.free and b.free for s in segments for a, b in pairwise(s))
    sizes = [sum(b.size_bytes for b in segment) for segment in segments]
    if expandable:
        assert len(sizes) <= 2
        assert all(size % (2 * MiB) == 0 for size in sizes)
    else:
        assert all(size == 2 * MiB or (size >= 10 * MiB and size % (2 * MiB) == 0) for size in sizes)


@both_modes
@settings(max_examples=60, deadline=None)
@given(program=PROGRAMS)
def test_freed_segments_are_whole_again(expandable: bool, program: Program) -> None:
    allocator = CachingAllocator(expandable)
    live: dict[int, int] = {}
    for _, live in _run(allocator, program):  # noqa: B007  # what is alive in the end
        pass
    for address in live.values():
        allocator.release(address)
    assert allocator.allocated_bytes == 0
    assert all(len(segment) == 1 and segment[0].free for segment in _segments(allocator))
    before = allocator.reserved_bytes
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (0, before)
    assert allocator.blocks() == []


@settings(max_examples=100, deadline=None)
@given(program=PROGRAMS)
def test_second_step_is_placed_like_the_first(program: Program) -> None:
    """With expandable segments a program whose memory is free again reserves nothing when it is repeated."""
    allocator = CachingAllocator(expandable=True)
    rounds = []
    for _ in range(2):
        placed, live = [], {}
        for event, live in _run(allocator, program):
            placed.append(live.get(event))
        for address in live.values():
            allocator.release(address)
        rounds.append((placed, allocator.reserved_bytes))
    assert rounds[0] == rounds[1]


def test_second_step_can_reserve_more_in_fixed_segments() -> None:
    """The first time 16 MiB come out of the 30; the second time out of the 20, and the 20 out of the 30."""
    allocator = CachingAllocator()
    reserved = []
    for _ in range(3):
        allocator.release(allocator.allocate(30 * MiB))
        addresses = [allocator.allocate(size * MiB) for size in (16, 20, 14)]
        for address in addresses:
            allocator.release(address)
        reserved.append(allocator.reserved_bytes // MiB)
    assert reserved == [50, 64, 64]


def test_expandable_segments_can_reserve_more() -> None:
    """No invariant: 29.5 MiB in a fixed segment leave room for 30 MiB, in an expandable one they do not."""
    program = [59 * MiB // 2] * 8 + [-8, -6, -4, -2] + [30 * MiB] * 4
    events, sizes = _events(program)
    assert [e for e in events if e < 0] == [-1, -3, -5, -7]
    assert replay_reserved(events, sizes) == 240 * MiB
    assert replay_reserved(events, sizes, expandable=True) == 360 * MiB


# --- a budget


@both_modes
@settings(max_examples=100, deadline=None)
@given(program=PROGRAMS)
def test_fits_between_live_and_reserved(expandable: bool, program: Program) -> None:
    events, sizes = _events(program)
    allocator = CachingAllocator(expandable)
    for _ in _run(allocator, program):
        pass
    live = peak = 0
    for event in events:
        live += _rounded(sizes[abs(event) - 1]) * (1 if event > 0 else -1)
        peak = max(peak, live)
    assert fits(events, sizes, allocator.peak_reserved_bytes, expandable)
    assert not peak or not fits(events, sizes, peak - 1, expandable)


def test_the_cache_is_emptied_where_a_trace_says_so() -> None:
    """40 MiB do not fit the 30 that are cached; with the cache emptied in between they need no more."""
    sizes = [30 * MiB, 40 * MiB]
    assert replay_reserved([1, -1, 2], sizes) == 70 * MiB
    assert replay_reserved([1, -1, CACHE_EMPTIED, 2], sizes) == 40 * MiB


def test_cached_segments_are_given_back_before_failing() -> None:
    events, sizes = _events([30 * MiB, -1, 12 * MiB, 40 * MiB])
    assert replay_reserved(events, sizes) == 70 * MiB  # the 12 come out of the 30
    assert fits(events, sizes, 70 * MiB)
    assert not fits(events, sizes, 69 * MiB)  # the 30 MiB are in use, if only 12 of them
    events, sizes = _events([30 * MiB, -1, 40 * MiB])
    assert replay_reserved(events, sizes) == 70 * MiB
    assert fits(events, sizes, 40 * MiB)


def test_free_pages_are_given_back_before_failing() -> None:
    """50, 10 and 60 MiB fill six pages; the first 50 free two whole ones, enough for 40 at the end."""
    events, sizes = _events([50 * MiB, 10 * MiB, 60 * MiB, -3, 51 * MiB])
    assert replay_reserved(events, sizes, expandable=True) == 180 * MiB
    assert fits(events, sizes, 140 * MiB, expandable=True)
    assert not fits(events, sizes, 139 * MiB, expandable=True)


def test_lowest_gap_is_filled_first() -> None:
    allocator = CachingAllocator(expandable=True)
    addresses = [allocator.allocate(size * MiB) for size in (40, 20, 40, 20)]
    for gap in (2, 0):
        allocator.release(addresses[gap])
        allocator.empty_cache()
    assert allocator.reserved_bytes == 40 * MiB
    assert allocator.allocate(40 * MiB) == addresses[0]


@pytest.mark.parametrize("order", [(2, 3), (3, 2)])
def test_gaps_merge(order: tuple[int, int]) -> None:
    """A hole of 8 MiB in front of a gap of 20 + 20 can grow to 48, so one of 30 MiB is taken before it."""
    allocator = CachingAllocator(expandable=True)
    addresses = [allocator.allocate(size * MiB) for size in (12, 8, 20, 20, 20, 30, 10)]
    allocator.release(addresses[1])
    for gap in order:
        allocator.release(addresses[gap])
        allocator.empty_cache()
    assert allocator.reserved_bytes == 80 * MiB
    allocator.release(addresses[5])
    assert allocator.allocate(5 * MiB) == addresses[5]


def test_budget_is_refused_by_name() -> None:
    allocator = CachingAllocator(budget_bytes=20 * MiB)
    allocator.allocate(15 * MiB)
    with pytest.raises(OutOfBudgetError, match=str(10 * MiB)):
        allocator.allocate(10 * MiB)


# --- the slow model


class _Model:
    """One pool as bytes: which pages have memory, which ranges are taken; all else is derived each time."""

    def __init__(self, small: bool, expandable: bool) -> None:
        self.small, self.expandable = small, expandable
        self.page = (2 if small else 20) * MiB
        self.segments: list[tuple[int, int]] = []  # (start, end) of fixed ones
        self.next_start = 0
        self.pages: set[int] = set()  # mapped ones of an expandable segment
        self.taken: dict[int, int] = {}  # start -> end

    @property
    def reserved(self) -> int:
        return sum(end - start for start, end in self.segments) + len(self.pages) * self.page

    def mapped(self) -> list[tuple[int, int]]:
        """Ranges with memory behind them."""
        runs: list[tuple[int, int]] = []
        for page in sorted(self.pages):
            start = page * self.page
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], start + self.page)
            else:
                runs.append((start, start + self.page))
        return runs or list(self.segments)

    def without_taken(self, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        holes = []
        for start, end in ranges:
            for first, last in sorted(self.taken.items()):
                if start <= first < end:
                    holes.append((start, first))
                    start = last
            holes.append((start, end))
        return [hole for hole in holes if hole[0] < hole[1]]

    def place(self, size: int) -> int | None:
        holes = [h for h in self.without_taken(self.mapped()) if h[1] - h[0] >= size]
        holes.sort(key=lambda hole: (hole[1] - hole[0], hole[0]))
        rooms = [end - start + self.unmapped_from(end) for start, end in holes]
        for at, hole in enumerate(holes):
            if at + 1 == len(holes) or rooms[at + 1] >= rooms[at]:
                return hole[0]
        return None

    def unmapped_from(self, end: int) -> int:
        if not self.expandable or end % self.page or end // self.page in self.pages:
            return 0
        behind = [page for page in self.pages if page * self.page > end]
        return min(behind) * self.page - end if behind else 1 << 50

    def growth(self, size: int) -> tuple[int, set[int]]:
        """Where a request goes that no hole holds, and the new pages it needs."""
        for start, end in self.without_taken([(0, 1 << 50)]):
            pages = range(start // self.page, -(-min(end, start + size) // self.page))
            all_pages = range(start // self.page, -(-min(end, 1 << 40) // self.page))
            if end - start >= size and any(page not in self.pages for page in all_pages):
                return start, set(pages) - self.pages
        raise AssertionError

    def grow(self, size: int, room: int) -> int | None:
        if self.expandable:
            start, new = self.growth(size)
            if len(new) * self.page > room:
                return None
            self.pages |= new
            return start
        n_bytes = 2 * MiB if self.small else 20 * MiB if size < 10 * MiB else -(-size // 2097152) * 2097152
        if n_bytes > room:
            return None
        self.segments.append((self.next_start, self.next_start + n_bytes))
        self.next_start += n_bytes
        return self.segments[-1][0]

    def take(self, start: int, size: int) -> None:
        end = next(end for first, end in self.without_taken(self.mapped()) if first == start)
        keep = 512 if self.small or self.expandable else MiB + 1
        self.taken[start] = start + size if end - start - size >= keep else end

    def give_back(self) -> None:
        def idle(start: int, end: int) -> bool:
            return all(last <= start or first >= end for first, last in self.taken.items())

        self.segments = [segment for segment in self.segments if not idle(*segment)]
        self.pages = {p for p in self.pages if not idle(p * self.page, (p + 1) * self.page)}


def _model_reserved(program: Program, expandable: bool, budget: int) -> Iterator[tuple[int, int]]:
    """Reserved and allocated bytes after each event; ends early where the budget is too small."""
    pools = {small: _Model(small, expandable) for small in (True, False)}
    events, sizes = _events(program)
    live: dict[int, tuple[_Model, int]] = {}
    for event in events:
        if event > 0:
            size = _rounded(sizes[event - 1])
            pool = pools[size <= MiB]
            start = pool.place(size)
            for retry in (False, True):
                if start is None:
                    if retry:
                        for each in pools.values():
                            each.give_back()
                    start = pool.grow(size, budget - sum(p.reserved for p in pools.values()))
            if start is None:
                return
            pool.take(start, size)
            live[event] = (pool, start)
        else:
            pool, start = live.pop(-event)
            del pool.taken[start]
        allocated = sum(end - start for p in pools.values() for start, end in p.taken.items())
        yield sum(p.reserved for p in pools.values()), allocated


def _replay_reserved(program: Program, expandable: bool, budget: int) -> Iterator[tuple[int, int]]:
    allocator = CachingAllocator(expandable, budget)
    try:
        for _ in _run(allocator, program):
            assert allocator.reserved_bytes <= budget
            yield allocator.reserved_bytes, allocator.allocated_bytes
    except OutOfBudgetError:
        pass


def _assert_equal_to_model(program: Program, expandable: bool, budget: int) -> None:
    assert list(_replay_reserved(program, expandable, budget)) == list(
        _model_reserved(program, expandable, budget)
    )


@both_modes
@settings(max_examples=150, deadline=None)
@given(program=PROGRAMS, budget=st.one_of(st.just(1 << 45), st.integers(40, 400).map(lambda n: n * MiB)))
@example(program=[50 * MiB, 10 * MiB, 60 * MiB, -3, 51 * MiB], budget=140 * MiB)
def test_equals_the_slow_model(expandable: bool, program: Program, budget: int) -> None:
    _assert_equal_to_model(program, expandable, budget)


@both_modes
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_slow_model_over_long_programs(expandable: bool, seed: int) -> None:
    """600 events of the sizes that a step mixes, without a budget and in one that forces giving back."""
    rng = random.Random(seed)
    sizes = [rng.choice((rng.randrange(1, MiB), rng.randrange(MiB, 40 * MiB))) for _ in range(12)]
    program = [rng.choice(sizes) if rng.random() < 0.52 else -rng.randrange(1, 60) for _ in range(600)]
    _assert_equal_to_model(program, expandable, 1 << 45)
    peak = replay_reserved(*_events(program), expandable)
    for percent in (95, 85, 75):
        _assert_equal_to_model(program, expandable, peak * percent // 100)
