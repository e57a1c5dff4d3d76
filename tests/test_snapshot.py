"""Histories in the format of torch.cuda.memory._snapshot(), written by hand, and what is made of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.memory.allocator import CachingAllocator, replay_reserved
from lowvram.memory.snapshot import is_expandable, recording_of, replay_snapshot
from lowvram.memory.trace import CACHE_EMPTIED
from lowvram.units import MiB

Entry = dict[str, Any]
A, B, C = 0x7F0000000000, 0x7F0010000000, 0x7F0020000000  # where segments begin


def _entry(action: str, addr: int, size: float, stream: int = 0) -> Entry:
    return {"action": action, "addr": addr, "size": int(size), "stream": stream, "time_us": 1, "frames": []}


def _freed(addr: int, size: float) -> list[Entry]:
    return [_entry("free_requested", addr, size), _entry("free_completed", addr, size)]


def _block(address: int, size: float, state: str = "active_allocated", requested: float = 0) -> Entry:
    requested = 0 if state == "inactive" else requested or size
    return {"address": address, "size": int(size), "requested_size": int(requested), "state": state}


def _segment(*blocks: Entry, expandable: bool = False, device: int = 0) -> Entry:
    total = sum(block["size"] for block in blocks)
    return {
        "device": device,
        "address": blocks[0]["address"],
        "total_size": total,
        "stream": 0,
        "segment_type": "small" if total == 2 * MiB else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": expandable,
        "blocks": list(blocks),
    }


def _snapshot(trace: list[Entry], segments: list[Entry], expandable: bool | None = None) -> dict[str, Any]:
    settings = {} if expandable is None else {"expandable_segments": expandable, "max_split_size": -1}
    return {"segments": segments, "device_traces": [trace, []], "allocator_settings": settings}


_FIXED = _snapshot(
    [
        _entry("segment_alloc", A, 2 * MiB),
        _entry("alloc", A, 1000),
        _entry("segment_alloc", B, 20 * MiB),
        _entry("alloc", B, 5 * MiB - 100),
        _entry("segment_alloc", C, 30 * MiB),
        _entry("alloc", C, 29.5 * MiB),  # the half MiB that is left is not split off
        *_freed(B, 5 * MiB - 100),
        _entry("alloc", B, 12 * MiB),
        _entry("snapshot", 0, 42 * MiB),
    ],
    [
        _segment(_block(A, 1024, requested=1000), _block(A + 1024, 2 * MiB - 1024, "inactive")),
        _segment(_block(B, 12 * MiB), _block(B + 12 * MiB, 8 * MiB, "inactive")),
        _segment(_block(C, 30 * MiB, requested=29.5 * MiB)),
    ],
)


def test_fixed_segments() -> None:
    found = replay_snapshot(_FIXED)
    assert found.recorded_peak_reserved_bytes == found.replayed_peak_reserved_bytes == 52 * MiB
    assert found.recorded_peak_allocated_bytes == 1024 + int(41.5 * MiB)
    assert found.replayed_peak_allocated_bytes == 1024 + 42 * MiB
    assert (found.first_difference, found.reserved_error) == (None, 0)
    assert (found.expandable, found.n_events, found.n_alive_before, found.n_streams) == (False, 5, 0, 1)
    recording = recording_of(_FIXED)
    assert recording.events == [1, 2, 3, -2, 4]
    assert recording.sizes == [1000, 5 * MiB - 100, int(29.5 * MiB), 12 * MiB]
    assert replay_reserved(recording.events, recording.sizes) == 52 * MiB


def test_expandable_segments() -> None:
    """30 MiB begin in the free 15 at the end, so one page is mapped for them; later a page is unmapped."""
    trace = [
        _entry("segment_map", A, 20 * MiB),
        _entry("alloc", A, 5 * MiB),
        _entry("segment_map", A + 20 * MiB, 20 * MiB),
        _entry("alloc", A + 5 * MiB, 30 * MiB),
        *_freed(A + 5 * MiB, 30 * MiB),
        _entry("segment_unmap", A + 20 * MiB, 20 * MiB),
        _entry("segment_map", A + 20 * MiB, 40 * MiB),
        _entry("alloc", A + 5 * MiB, 45 * MiB),
    ]
    blocks = (_block(A, 5 * MiB), _block(A + 5 * MiB, 45 * MiB), _block(A + 50 * MiB, 10 * MiB, "inactive"))
    snapshot = _snapshot(trace, [_segment(*blocks, expandable=True)])
    found = replay_snapshot(snapshot)
    assert found.recorded_peak_reserved_bytes == found.replayed_peak_reserved_bytes == 60 * MiB
    assert found.recorded_peak_allocated_bytes == found.replayed_peak_allocated_bytes == 50 * MiB
    assert (found.first_difference, found.expandable) == (None, True)
    assert recording_of(snapshot).events == [1, 2, -2, CACHE_EMPTIED, 3]


def test_cache_given_back_for_a_larger_segment() -> None:
    trace = [
        _entry("segment_alloc", A, 30 * MiB),
        _entry("alloc", A, 30 * MiB),
        _entry("segment_alloc", B, 12 * MiB),
        _entry("alloc", B, 12 * MiB),
        *_freed(A, 30 * MiB),
        *_freed(B, 12 * MiB),
        _entry("segment_free", A, 30 * MiB),
        _entry("segment_free", B, 12 * MiB),
        _entry("segment_alloc", C, 36 * MiB),
        _entry("alloc", C, 36 * MiB),
    ]
    snapshot = _snapshot(trace, [_segment(_block(C, 36 * MiB))])
    found = replay_snapshot(snapshot)
    assert found.recorded_peak_reserved_bytes == found.replayed_peak_reserved_bytes == 42 * MiB
    assert found.first_difference is None
    assert recording_of(snapshot).events == [1, 2, -1, -2, CACHE_EMPTIED, 3]


def test_blocks_from_before_the_recording() -> None:
    """One that stays is only in the segments, one that goes only in a free; a third waits for its stream."""
    trace = [
        *_freed(A + 6 * MiB, 4 * MiB),
        _entry("alloc", A + 6 * MiB, 3 * MiB),
        _entry("free_requested", A + 6 * MiB, 3 * MiB),
    ]
    segment = _segment(
        _block(A, 6 * MiB, requested=6 * MiB - 5),
        _block(A + 6 * MiB, 3 * MiB, "active_pending_free"),
        _block(A + 9 * MiB, 11 * MiB, "inactive"),
    )
    snapshot = _snapshot(trace, [segment])
    recording = recording_of(snapshot)
    assert (recording.events, recording.n_alive_before) == ([1, 2, -2, 3], 2)
    assert recording.sizes == [6 * MiB - 5, 4 * MiB, 3 * MiB]
    assert recording.reserved_bytes == [None, None, 20 * MiB, 20 * MiB]
    found = replay_snapshot(snapshot)
    assert found.recorded_peak_reserved_bytes == found.replayed_peak_reserved_bytes == 20 * MiB
    assert (found.recorded_peak_allocated_bytes, found.n_alive_before) == (10 * MiB, 2)


def test_difference_is_found() -> None:
    """A history that breaks our rules: 11 MiB in a segment of 20, and the next one in that segment's rest."""
    trace = [
        _entry("segment_alloc", A, 2 * MiB),
        _entry("alloc", A, 512),
        _entry("segment_alloc", B, 20 * MiB),
        _entry("alloc", B, 11 * MiB),
        _entry("alloc", B + 11 * MiB, 9 * MiB),
    ]
    segments = [
        _segment(_block(A, 512), _block(A + 512, 2 * MiB - 512, "inactive")),
        _segment(_block(B, 11 * MiB), _block(B + 11 * MiB, 9 * MiB)),
    ]
    found = replay_snapshot(_snapshot(trace, segments))
    assert found.first_difference == 1
    assert (found.recorded_peak_reserved_bytes, found.replayed_peak_reserved_bytes) == (22 * MiB, 34 * MiB)
    assert found.reserved_error == pytest.approx(12 / 22)


def test_what_does_not_count() -> None:
    """Another GPU's segments, out of memory without an address, unknown actions; streams are counted."""
    trace = [
        {"action": "oom", "device_free": 5, "size": 99, "stream": 0},
        {"action": "user_defined"},
        _entry("segment_alloc", A, 20 * MiB),
        _entry("alloc", A, 5 * MiB),
        _entry("alloc", A + 5 * MiB, 5 * MiB, stream=7),
    ]
    blocks = (_block(A, 5 * MiB), _block(A + 5 * MiB, 5 * MiB), _block(A + 10 * MiB, 10 * MiB, "inactive"))
    snapshot = _snapshot(trace, [_segment(*blocks), _segment(_block(B, 40 * MiB), device=1)])
    found = replay_snapshot(snapshot)
    assert (found.recorded_peak_reserved_bytes, found.n_events, found.n_streams) == (20 * MiB, 2, 2)
    assert replay_snapshot(snapshot, device=1).n_alive_before == 1
    assert replay_snapshot(snapshot, device=5).recorded_peak_reserved_bytes == 0


def test_empty_history() -> None:
    found = replay_snapshot({"segments": [], "device_traces": []})
    assert (found.n_events, found.reserved_error, found.first_difference) == (0, 0.0, None)


def test_kind_of_segments() -> None:
    assert is_expandable(_snapshot([], [], expandable=True))
    assert not is_expandable(_snapshot([_entry("segment_map", A, 1)], [], expandable=False))
    assert is_expandable(_snapshot([_entry("segment_map", A, 1)], []))
    assert is_expandable(_snapshot([], [_segment(_block(A, 1), expandable=True)]))
    assert not is_expandable(_FIXED)


def _recorded(program: list[int], expandable: bool) -> tuple[list[Entry], list[int], CachingAllocator]:
    """The entries torch would write if our rules were its own, and which entries begin an event."""
    allocator, trace, alive, begins = CachingAllocator(expandable), [], [], []
    grown = "segment_map" if expandable else "segment_alloc"
    for number in program:
        begins.append(len(trace))
        if number > 0:
            before, address = allocator.reserved_bytes, allocator.allocate(number)
            if allocator.reserved_bytes > before:
                trace.append(_entry(grown, address, allocator.reserved_bytes - before))
            trace.append(_entry("alloc", address, number))
            alive.append((address, number))
        elif alive:
            address, size = alive.pop(number % len(alive))
            allocator.release(address)
            trace += _freed(address, size)
    return trace, begins, allocator


@settings(max_examples=60, deadline=None)
@given(
    program=st.lists(st.one_of(st.integers(1, 40 * MiB), st.integers(-20, -1)), min_size=1, max_size=40),
    expandable=st.booleans(),
    cut=st.integers(0, 39),
)
def test_recording_that_begins_late(program: list[int], expandable: bool, cut: int) -> None:
    """Whatever the cut: what was alive there, and the events from there on; a whole one is replayed alike."""
    trace, begins, allocator = _recorded(program, expandable)
    cut %= len(program)
    early, late = trace[: begins[cut]], trace[begins[cut] :]
    blocks = [
        _block(b.address, b.size_bytes, "inactive" if b.free else "active_allocated")
        for b in allocator.blocks()
    ]
    snapshot = _snapshot(late, [_segment(block) for block in blocks], expandable)
    recording = recording_of(snapshot)
    count = {action: sum(e["action"] == action for e in early) for action in ("alloc", "free_completed")}
    assert recording.n_alive_before == count["alloc"] - count["free_completed"]
    assert len(recording.events) - recording.n_alive_before == sum(
        e["action"] in ("alloc", "free_completed") for e in late
    )
    assert recording.peak_reserved_bytes == allocator.peak_reserved_bytes
    found = replay_snapshot(snapshot)
    assert cut or (found.first_difference, found.reserved_error) == (None, 0)
    assert cut or found.replayed_peak_allocated_bytes == allocator.peak_allocated_bytes
