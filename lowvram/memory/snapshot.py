"""A recorded torch.cuda.memory._snapshot(), replayed through our allocator and compared event by event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowvram.frozen import Frozen
from lowvram.memory.allocator import ROUNDING, CachingAllocator
from lowvram.memory.trace import CACHE_EMPTIED, round_up

_RESERVING = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


class SnapshotComparison(Frozen):
    """What torch reserved, and what our rules reserve for the same allocations.

    The two should be equal where `n_alive_before` is 0 and `n_streams` is 1. Of what was there before the
    recording only the sizes are known, not how it came to lie where it lay. And each stream has pools of its
    own, while we keep one pair for all.
    """

    recorded_peak_reserved_bytes: int
    replayed_peak_reserved_bytes: int
    recorded_peak_allocated_bytes: int  # requests, each rounded to 512 bytes
    replayed_peak_allocated_bytes: (
        int  # with rests too small to be split off, as max_memory_allocated() counts
    )
    first_difference: int | None  # the event after which the reserved bytes differ for the first time
    expandable: bool
    n_events: int
    n_alive_before: int  # blocks that were allocated before the recording began
    n_streams: int

    @property
    def reserved_error(self) -> float:
        """Replayed against recorded, as a fraction; negative is an under-estimate."""
        recorded = self.recorded_peak_reserved_bytes
        return (self.replayed_peak_reserved_bytes - recorded) / recorded if recorded else 0.0


@dataclass
class Recording:
    """One device's history as events and sizes; what was alive before it is allocated first."""

    events: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    reserved_bytes: list[int | None] = field(default_factory=list)  # after each event; None: not comparable
    peak_reserved_bytes: int = 0
    n_alive_before: int = 0
    number_at: dict[int, int] = field(default_factory=dict)  # address -> the allocation that is there

    def allocate(self, address: int, size: int, reserved: int | None) -> None:
        self.sizes.append(size)
        self.number_at[address] = len(self.sizes)
        self._append(len(self.sizes), reserved)

    def free(self, address: int, reserved: int) -> None:
        self._append(-self.number_at.pop(address), reserved)

    def empty_cache(self) -> None:
        if not self.events or self.events[-1] != CACHE_EMPTIED:  # one for all segments given back at once
            self._append(CACHE_EMPTIED, None)

    def _append(self, event: int, reserved: int | None) -> None:
        self.events.append(event)
        self.reserved_bytes.append(reserved)


def replay_snapshot(snapshot: Mapping[str, Any], device: int = 0) -> SnapshotComparison:
    """Compare the recorded history of one GPU with our replay of it.

    Args:
        snapshot: what torch.cuda.memory._snapshot() returned, after _record_memory_history(). A history whose
            beginning was overwritten (`max_entries`) counts as begun later.
        device: the GPU's index.
    """
    trace, expandable = _trace(snapshot, device), is_expandable(snapshot, device)
    recording = recording_of(snapshot, device)
    allocator = CachingAllocator(expandable)
    peak_live, first_difference = _replay(recording, allocator)
    return SnapshotComparison(
        recorded_peak_reserved_bytes=recording.peak_reserved_bytes,
        replayed_peak_reserved_bytes=allocator.peak_reserved_bytes,
        recorded_peak_allocated_bytes=peak_live,
        replayed_peak_allocated_bytes=allocator.peak_allocated_bytes,
        first_difference=first_difference,
        expandable=expandable,
        n_events=len(recording.events),
        n_alive_before=recording.n_alive_before,
        n_streams=len({entry["stream"] for entry in trace if entry["action"] == "alloc"}),
    )


def is_expandable(snapshot: Mapping[str, Any], device: int = 0) -> bool:
    """Whether segments were expandable: the settings say so, or else what happened."""
    setting = snapshot.get("allocator_settings", {}).get("expandable_segments")
    if setting is not None:
        return bool(setting)
    mapped = any(entry["action"] == "segment_map" for entry in _trace(snapshot, device))
    return mapped or any(segment.get("is_expandable") for segment in _segments(snapshot, device))


def recording_of(snapshot: Mapping[str, Any], device: int = 0) -> Recording:
    """The history as events and sizes like a traced step's, with what torch had reserved after each."""
    trace, segments = _trace(snapshot, device), _segments(snapshot, device)
    recording = Recording()
    for address, size in sorted(_alive_before(trace, segments).items()):
        recording.allocate(address, size, None)
    recording.n_alive_before = len(recording.events)
    reserved = sum(segment["total_size"] for segment in segments) - sum(map(_reserves, trace))
    recording.peak_reserved_bytes = reserved
    for entry in trace:
        action, change = entry["action"], _reserves(entry)
        reserved += change
        recording.peak_reserved_bytes = max(recording.peak_reserved_bytes, reserved)
        if change < 0:
            recording.empty_cache()
        elif action == "alloc":
            recording.allocate(entry["addr"], entry["size"], reserved)
        elif action == "free_completed":  # from here on others can have it; free_requested only announces it
            recording.free(entry["addr"], reserved)
    return recording


def _alive_before(
    trace: Sequence[Mapping[str, Any]], segments: Sequence[Mapping[str, Any]]
) -> dict[int, int]:
    """Address and size of what was allocated when the recording began: backwards from its end."""
    blocks = [block for segment in segments for block in segment["blocks"] if block["state"] != "inactive"]
    alive = {block["address"]: block.get("requested_size") or block["size"] for block in blocks}
    for entry in reversed(trace):
        if entry["action"] == "alloc":
            alive.pop(entry["addr"], None)
        elif entry["action"] == "free_completed":
            alive[entry["addr"]] = entry["size"]
    return alive


def _replay(recording: Recording, allocator: CachingAllocator) -> tuple[int, int | None]:
    """Peak of the rounded requests, and the first event after which not the recorded bytes are reserved."""
    addresses: dict[int, int] = {}
    live = peak = 0
    first_difference = None
    for index, (event, recorded) in enumerate(zip(recording.events, recording.reserved_bytes, strict=True)):
        if event == CACHE_EMPTIED:
            allocator.empty_cache()
            continue
        size = recording.sizes[abs(event) - 1]
        if event > 0:
            addresses[event] = allocator.allocate(size)
        else:
            allocator.release(addresses.pop(-event))
        live += round_up(size, ROUNDING) if event > 0 else -round_up(size, ROUNDING)
        peak = max(peak, live)
        if first_difference is None and recorded not in (None, allocator.reserved_bytes):
            first_difference = index
    return peak, first_difference


def _reserves(entry: Mapping[str, Any]) -> int:
    sign = _RESERVING.get(entry["action"])
    return int(sign * entry["size"]) if sign else 0


def _trace(snapshot: Mapping[str, Any], device: int) -> Sequence[Mapping[str, Any]]:
    traces = snapshot["device_traces"]
    return traces[device] if device < len(traces) else []


def _segments(snapshot: Mapping[str, Any], device: int) -> Sequence[Mapping[str, Any]]:
    return [segment for segment in snapshot["segments"] if segment.get("device", 0) == device]
