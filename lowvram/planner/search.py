"""Search: the fastest candidate that fits, judged by a trace of its step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lowvram.engine.config import StepConfig
from lowvram.hardware import Hardware
from lowvram.memory.cache import RememberedModel
from lowvram.memory.estimate import MemoryEstimate
from lowvram.memory.trace import Backend
from lowvram.planner.ladder import (
    describe,
    host_bytes,
    longest_on_host,
    micro_batches,
    rungs,
    split,
    with_length,
)
from lowvram.planner.time_model import seconds_per_step

Say = Callable[[str], None]


@dataclass
class Search:
    """One model on one device; remembers every trace it made."""

    model: RememberedModel
    hardware: Hardware
    budget_bytes: int
    tokens_per_example: float
    say: Say = lambda _: None
    _known: dict[str, MemoryEstimate] = field(default_factory=dict)

    @property
    def backend(self) -> Backend:
        return "cpu" if self.hardware.backend == "cpu" else "cuda"

    def seconds(self, step: StepConfig) -> float:
        return seconds_per_step(
            step,
            self.hardware,
            n_parameters=self.model.shape.n_parameters,
            n_layers=self.model.shape.n_layers,
            hidden_size=self.model.shape.hidden_size,
            tokens_per_example=self.tokens_per_example,
        )

    def estimate(self, step: StepConfig) -> MemoryEstimate:
        key = step.model_dump_json()
        if key not in self._known:
            self.say(f"tracing {describe(step)}")
            self._known[key] = self.model.estimate(step, self.backend, self.hardware.capability)
        return self._known[key]

    def reserved_bytes(self, step: StepConfig) -> int:
        return self.estimate(step).peak_reserved_bytes

    def fastest(self, base: StepConfig, pinned: dict[str, Any], optimizer: str | None) -> Found | None:
        """The candidate with the least predicted time whose trace is within the budget.

        A rung that could not beat the best found so far, even at its best micro-batch, is not traced.
        """
        best: Found | None = None
        for rung in self.rungs(base, pinned, optimizer):
            sizes = micro_batches(rung.micro_batch * rung.accumulation)
            at_best = min(self.seconds(split(rung, size)) for size in sizes)
            if best is None or at_best < self.seconds(best.step):
                found = self._best_micro_batch(rung, sizes)
                if found and (best is None or self.seconds(found.step) < self.seconds(best.step)):
                    best = found
        return best

    def _best_micro_batch(self, rung: StepConfig, sizes: list[int]) -> Found | None:
        """The rung at the fastest micro-batch that fits; None when not even one sequence does."""
        if not self._fits(split(rung, 1)):
            return None
        for size in sorted(sizes, key=lambda n: self.seconds(split(rung, n))):
            if size > 1 and not self._plausible(rung, size):
                continue
            step = split(rung, size)
            if self._fits(step):
                return Found(step, self.estimate(step))
        return None

    def _plausible(self, rung: StepConfig, size: int) -> bool:
        """Rule a size out by the line through 1 and 2 sequences, which is right within a few percent."""
        one, two = (self.reserved_bytes(split(rung, n)) if size >= n else 0 for n in (1, 2))
        return size <= 2 or one + (size - 1) * (two - one) <= 1.1 * self.budget_bytes

    def rungs(self, base: StepConfig, pinned: dict[str, Any], optimizer: str | None) -> list[StepConfig]:
        """The candidates at one sequence length, from the fastest to the smallest."""
        return list(rungs(base, pinned, optimizer, self.backend, self.model.shape))

    def _fits(self, step: StepConfig) -> bool:
        on_host = host_bytes(step, self.model.shape) <= self.hardware.host_free_bytes
        return (on_host or self.backend == "cpu") and self.reserved_bytes(step) <= self.budget_bytes

    def largest_seq_len(self, step: StepConfig, limit: int) -> int:
        """Longest sequence that fits with all else as in `step` (0 when none does), to 64 tokens or 2 %."""
        limit = min(limit, longest_on_host(step, self.model.shape, self.hardware.host_free_bytes))
        fits, too_long = 0, limit // 64 + 1  # in units of 64 tokens
        at = max(min(step.seq_len // 64, limit // 64), 1)
        bytes_at: dict[int, int] = {}
        while too_long - fits > (close := max(fits // 50, 1)):
            at = max(fits + close, min(at, too_long - close))
            bytes_at[at] = self.reserved_bytes(with_length(step, at * 64))
            fits, too_long = (at, too_long) if bytes_at[at] <= self.budget_bytes else (fits, at)
            at = where_it_meets(self.budget_bytes, bytes_at) if len(bytes_at) > 1 else 2 * fits or at // 2
        return fits * 64


def where_it_meets(budget_bytes: int, bytes_at: dict[int, int]) -> int:
    """Where the line through the two known points nearest to the budget meets it."""
    low, high = sorted(sorted(bytes_at, key=lambda n: abs(bytes_at[n] - budget_bytes))[:2])
    slope = max((bytes_at[high] - bytes_at[low]) / (high - low), 1.0)
    return int(low + (budget_bytes - bytes_at[low]) / slope)


@dataclass(frozen=True)
class Found:
    """A step and its estimate."""

    step: StepConfig
    estimate: MemoryEstimate
