"""Search: the fastest candidate that fits, judged by a trace of its step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
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
    with_kept,
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
    _first: StepConfig = field(init=False)  # the fastest rung of the search that goes on
    _layer_bytes_at: dict[int, float] = field(default_factory=dict)  # by seq_len

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

        A rung that could not beat the best found so far, even at its best, is not traced.
        """
        best: Found | None = None
        rungs = self.rungs(base, pinned, optimizer)
        self._first = rungs[0]
        for rung in rungs:
            limit_seconds = self.seconds(best.step) if best else math.inf
            fills = self._fills(rung, pinned)
            most_kept = self._most_kept if fills else 0
            if self._least_seconds(rung, most_kept) < limit_seconds and self._fits(split(rung, 1)):
                best = self._within(self._candidates(rung, fills), limit_seconds, fills) or best
        return best

    def _least_seconds(self, rung: StepConfig, kept_layers: int) -> float:
        """At the best micro-batch, if so many layers could keep their activations."""
        at = [split(rung, size) for size in micro_batches(rung.micro_batch * rung.accumulation)]
        return min(self.seconds(with_kept(step, kept_layers or step.levers.kept_layers)) for step in at)

    def _candidates(self, rung: StepConfig, fills: bool) -> list[StepConfig]:
        """The rung in micro-batches that may fit, with as many layers kept as there seems to be room for.

        By the line through 1 and 2 sequences, which is right within a few percent.
        """
        one = self.reserved_bytes(split(rung, 1))
        found = [self._filled(split(rung, 1), one) if fills else split(rung, 1)]
        for size in micro_batches(rung.micro_batch * rung.accumulation)[1:]:
            step = split(rung, size)
            at_best = self._filled(step, one) if fills else step
            if self.seconds(at_best) >= self.seconds(found[0]):
                continue
            needed = one + (size - 1) * (self.reserved_bytes(split(rung, 2)) - one)
            if size <= 2 or needed <= 1.1 * self.budget_bytes:
                found.append(self._filled(step, needed) if fills else step)
        return sorted(found, key=self.seconds)

    def _within(self, candidates: list[StepConfig], limit_seconds: float, fills: bool) -> Found | None:
        """The first that fits and is faster than the limit, with fewer or more kept layers if it `fills`."""
        for step in candidates:
            if self.seconds(step) >= limit_seconds:
                break
            fitting = self._fitting(step, fills)
            if fitting and self.seconds(fitting) < limit_seconds:
                return Found(fitting, self.estimate(fitting))
        return None

    def _fitting(self, step: StepConfig, fills: bool) -> StepConfig | None:
        while not self._fits(step):
            if not (fills and step.levers.kept_layers):
                return None
            step = with_kept(step, self._fewer(step))
        return self._fuller(step) if fills else step

    def _fuller(self, step: StepConfig) -> StepConfig:
        """With the kept layers that there turned out to be room for, beside those already kept."""
        if not step.levers.kept_layers:
            return step
        more = with_kept(step, step.levers.kept_layers + self._kept_in(step, self.reserved_bytes(step)))
        if more.levers.kept_layers > self._most_kept:
            more = with_kept(step, self._most_kept)
        return more if self._fits(more) else step

    def _fills(self, rung: StepConfig, pinned: dict[str, Any]) -> bool:
        """Whether the planner may let some layers keep their activations."""
        levers = rung.levers
        free = not {"gradient_checkpointing", "kept_layers"} & set(pinned)
        return free and levers.gradient_checkpointing and not levers.tiles and self._most_kept > 0

    @cached_property
    def _most_kept(self) -> int:
        """All layers but one; whole periods, so that a trace need not run every layer."""
        shape, period = self.model.shape, self.model.layer_period
        if shape.task_type != "CAUSAL_LM" or not period:
            return 0
        return (shape.n_layers - 1) // period * period

    def _filled(self, step: StepConfig, needed_bytes: float) -> StepConfig:
        """With as many kept layers as seem to have room beside `needed_bytes`."""
        return with_kept(step, min(self._kept_in(step, needed_bytes), self._most_kept))

    def _kept_in(self, step: StepConfig, needed_bytes: float) -> int:
        """How many layers' activations the budget has room for beside `needed_bytes`; whole periods."""
        period = self.model.layer_period
        room = max(self.budget_bytes - needed_bytes, 0)
        return int(room / (self._layer_bytes(step) * step.micro_batch * period)) * period

    def _fewer(self, step: StepConfig) -> int:
        """Kept layers on the line through none and as many as turned out too many."""
        kept, period = step.levers.kept_layers, self.model.layer_period
        none = self.reserved_bytes(with_kept(step, 0))
        room = max(self.budget_bytes - none, 0)
        share = room / max(self.reserved_bytes(step) - none, 1)
        return max(min(int(share * kept) // period * period, kept - period), 0)

    def _layer_bytes(self, step: StepConfig) -> float:
        """What one layer of one sequence keeps when it is not recomputed, with the first rung's levers."""
        if step.seq_len not in self._layer_bytes_at:
            levers = self._first.levers.model_copy(update={"gradient_checkpointing": True})
            one = split(self._first.model_copy(update={"levers": levers}), 1)
            kept = one.model_copy(
                update={"levers": one.levers.model_copy(update={"gradient_checkpointing": False})}
            )
            more = self.reserved_bytes(kept) - self.reserved_bytes(one)
            self._layer_bytes_at[step.seq_len] = max(more / (self.model.shape.n_layers - 1), 1.0)
        return self._layer_bytes_at[step.seq_len]

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
