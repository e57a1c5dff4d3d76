"""Trace: every allocation and free of one training step, in order, with where and when each happened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Backend = Literal["cuda", "cpu"]
Capability = tuple[int, int] | None

ALLOC_ROUNDING = 512  # the CUDA caching allocator's smallest unit, bytes
CACHE_EMPTIED = 0  # the event at which the allocator gives cached memory back
OUTSIDE = -1  # the layer of what runs outside all layers


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(slots=True)
class Allocation:
    """One storage's life. `born` and `died` index the event list; `died` is None while it lives."""

    n_bytes: int
    phase: str  # load, evaluation, initialisation, forward, backward, clip, optimizer; prefill, decode
    module: str  # the module that ran last, "layers.3.mlp.down_proj"
    op: str
    component: str | None = None  # None: decided by its life, see `estimate.component_of`
    born: int = 0
    died: int | None = None
    bytes_by_layer: tuple[int, ...] = ()  # the share of each layer in something that all layers share


@dataclass
class Trace:
    """Allocations and the order of events: +i allocates allocation i-1, -i frees it, 0 empties the cache."""

    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)  # the layer that ran at each event, or OUTSIDE
    backward_starts: list[int] = field(default_factory=list)  # event index at which each backward began

    def allocate(self, allocation: Allocation, layer: int) -> int:
        allocation.born = len(self.events)
        self.allocations.append(allocation)
        self.events.append(len(self.allocations))
        self.layers.append(layer)
        return len(self.allocations) - 1

    def free(self, index: int, layer: int) -> None:
        self.allocations[index].died = len(self.events)
        self.events.append(-(index + 1))
        self.layers.append(layer)

    def empty_cache(self) -> None:
        self.events.append(CACHE_EMPTIED)
        self.layers.append(OUTSIDE)

    def changes_bytes(self) -> Iterator[int]:
        """What each event adds to the memory in use."""
        for event in self.events:
            n_bytes = self.allocations[abs(event) - 1].n_bytes if event else 0
            yield n_bytes if event > 0 else -n_bytes
