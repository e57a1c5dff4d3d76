"""Search: the fastest candidate that fits, judged by a trace of its step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lowvram.engine.config import Levers, StepConfig
from lowvram.hardware import Hardware
from lowvram.memory.cache import RememberedModel
from lowvram.memory.estimate import MemoryEstimate
from lowvram.memory.trace import Backend
from lowvram.planner.time_model import seconds_per_step

Say = Callable[[str], None]

# From fastest to smallest. Each row saves memory over the one before it.
_LADDER: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": False, "loss_chunk_tokens": 1024},
    {"gradient_checkpointing": True, "loss_chunk_tokens": 1024},
    {"gradient_checkpointing": True, "loss_chunk_tokens": 256},
    {"gradient_checkpointing": True, "loss_chunk_tokens": 64, "optimizer": "paged_adamw8bit"},
)


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
        for rung in rungs(base, pinned, optimizer, self.backend):
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

    def _fits(self, step: StepConfig) -> bool:
        return self.reserved_bytes(step) <= self.budget_bytes

    def largest_seq_len(self, step: StepConfig, limit: int) -> int:
        """Longest sequence that fits with all else as in `step` (0 when none does), to 64 tokens or 2 %."""
        fits, too_long = 0, limit // 64 + 1  # in units of 64 tokens
        at = max(min(step.seq_len // 64, limit // 64), 1)
        bytes_at: dict[int, int] = {}
        while too_long - fits > (close := max(fits // 50, 1)):
            at = max(fits + close, min(at, too_long - close))
            bytes_at[at] = self.reserved_bytes(step.model_copy(update={"seq_len": at * 64}))
            fits, too_long = (at, too_long) if bytes_at[at] <= self.budget_bytes else (fits, at)
            at = _where_it_meets(self.budget_bytes, bytes_at) if len(bytes_at) > 1 else 2 * fits or at // 2
        return fits * 64


def _where_it_meets(budget_bytes: int, bytes_at: dict[int, int]) -> int:
    """Where the line through the two known points nearest to the budget meets it."""
    low, high = sorted(sorted(bytes_at, key=lambda n: abs(bytes_at[n] - budget_bytes))[:2])
    slope = max((bytes_at[high] - bytes_at[low]) / (high - low), 1.0)
    return int(low + (budget_bytes - bytes_at[low]) / slope)


@dataclass(frozen=True)
class Found:
    """A step and its estimate."""

    step: StepConfig
    estimate: MemoryEstimate


def rungs(
    base: StepConfig, pinned: dict[str, Any], optimizer: str | None, backend: Backend
) -> Iterator[StepConfig]:
    """The ladder with the user's levers and optimizer fixed, without repetitions."""
    seen: set[str] = set()
    for row in _LADDER:
        wanted = dict(row)
        chosen = optimizer or (wanted.pop("optimizer", "adamw") if backend == "cuda" else "adamw")
        wanted.pop("optimizer", None)
        levers = Levers(**{**base.levers.model_dump(), **wanted, **pinned})
        step = base.model_copy(update={"levers": levers, "optimizer": chosen})
        if step.model_dump_json() not in seen:
            seen.add(step.model_dump_json())
            yield step


def micro_batches(effective_batch: int) -> list[int]:
    """Powers of two that divide the effective batch, up to 16, and the whole batch when it is small."""
    sizes = {n for n in (1, 2, 4, 8, 16) if effective_batch % n == 0}
    return sorted(sizes | ({effective_batch} if effective_batch <= 16 else set()))


def split(step: StepConfig, micro_batch: int) -> StepConfig:
    """The same effective batch in micro-batches of another size."""
    whole = step.micro_batch * step.accumulation
    return step.model_copy(update={"micro_batch": micro_batch, "accumulation": whole // micro_batch})


def describe(step: StepConfig) -> str:
    checkpointing = "recompute" if step.levers.gradient_checkpointing else "keep all activations"
    return f"{step.micro_batch} x {step.seq_len} tokens, {checkpointing}, {step.optimizer}"
