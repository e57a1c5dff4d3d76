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
from lowvram.planner.arithmetic import floor_bytes, working_bytes
from lowvram.planner.guess import Guess
from lowvram.planner.host_memory import host_bytes, longest_on_host
from lowvram.planner.hunt import Hunt
from lowvram.planner.levers import Setting
from lowvram.planner.space import Candidate, candidates
from lowvram.planner.time_model import TimeModel
from lowvram.planner.variants import describe, with_kept, with_length
from lowvram.planner.workload import Workload

Say = Callable[[str], None]


@dataclass(frozen=True)
class Freedom:
    """What the planner may decide: all that the user has not fixed and the profile allows."""

    pinned: dict[str, Any] = field(default_factory=dict)  # levers, and fields of the step
    ladder: tuple[str, ...] = ()  # levers that may be moved, in the order in which that is liked
    uses_host: bool = True
    packing: bool = False
    quantized_head: bool = True  # unless it is pinned


@dataclass
class Search:
    """One model on one device; remembers every trace it made."""

    model: RememberedModel
    hardware: Hardware
    budget_bytes: int
    time: TimeModel
    work: Callable[[int, int], Workload]  # of a sequence length and an effective batch
    freedom: Freedom
    say: Say = lambda _: None
    _known: dict[str, MemoryEstimate] = field(default_factory=dict)
    _spaces: dict[StepConfig, list[Candidate]] = field(init=False, default_factory=dict)  # of this freedom

    @property
    def backend(self) -> Backend:
        return "cpu" if self.hardware.backend == "cpu" else "cuda"

    def seconds(self, step: StepConfig) -> float:
        return self.time.seconds(step, self.work(step.seq_len, step.effective_batch))

    def estimate(self, step: StepConfig) -> MemoryEstimate:
        key = step.model_dump_json()
        if key not in self._known:
            self.say(f"tracing {describe(step)}")
            self._known[key] = self.model.estimate(step, self.backend, self.hardware.capability)
        return self._known[key]

    def reserved_bytes(self, step: StepConfig) -> int:
        return self.estimate(step).peak_reserved_bytes

    def fits(self, step: StepConfig) -> bool:
        """Traced only where what is there for certain leaves room."""
        room = floor_bytes(step, self.model.shape) <= self.budget_bytes and self.host_has_room(step)
        return room and self.reserved_bytes(step) <= self.budget_bytes

    def host_has_room(self, step: StepConfig) -> bool:
        """A CPU's own memory is the budget."""
        on_host = host_bytes(step, self.model.shape) <= self.hardware.host_free_bytes
        return on_host or self.backend == "cpu"

    def setting(self, base: StepConfig) -> Setting:
        period = self.model.layer_period
        return Setting(base, self.model.shape, self.hardware, period, self.freedom.uses_host)

    def candidates(self, base: StepConfig) -> list[Candidate]:
        """All that may be decided around `base`."""
        return [one for one in self._space(base) if self.host_has_room(one.step)]

    def _space(self, base: StepConfig) -> list[Candidate]:
        """Made once for each step that the planner comes back to: 0.07 s."""
        if base not in self._spaces:
            self._spaces[base] = self._made_space(base)
        return self._spaces[base]

    def _made_space(self, base: StepConfig) -> list[Candidate]:
        freedom = self.freedom
        found = candidates(self.setting(base), freedom.pinned, freedom.ladder, freedom.packing)
        may = freedom.quantized_head or "head" in freedom.pinned
        return found if may else [one for one in found if one.step.levers.head not in ("int8", "nf4")]

    def fastest(self, base: StepConfig) -> StepConfig | None:
        """The candidate with the least predicted time whose trace is within the budget."""
        return self.fastest_of(self.candidates(base))

    def fastest_of(self, some: list[Candidate]) -> StepConfig | None:
        guess = Guess(self.model.shape)
        return Hunt(some, self.seconds, self.estimate, self.budget_bytes, guess).fastest()

    def leanest(self, base: StepConfig) -> StepConfig:
        """The candidate that by arithmetic takes least; where the host has room for none, of all of them.

        Of equals the one whose levers are further along: arithmetic sees only the larger of a layer's work
        and the logits, a trace may see both.
        """
        return self.leanest_of(self.candidates(base) or self._space(base))

    def leanest_of(self, some: list[Candidate]) -> StepConfig:
        shape = self.model.shape

        def least(one: Candidate) -> tuple[float, int]:
            return floor_bytes(one.step, shape) + max(working_bytes(one.step, shape)), -sum(one.place)

        return min(some, key=least).step

    def largest_seq_len(self, step: StepConfig, limit: int, keeps: bool = False) -> int:
        """Longest sequence that fits with all else as in `step` (0 when none does), to 64 tokens or 2 %.

        Args:
            keeps: layers that keep their activations go on doing so; otherwise all recompute.
        """
        kept = step.levers.kept_layers if keeps else 0
        if not self.host_has_room(with_length(step, 64)):
            return 0
        limit = min(limit, longest_on_host(step, self.model.shape, self.hardware.host_free_bytes))
        fits, too_long = 0, limit // 64 + 1  # in units of 64 tokens
        over: dict[int, float] = {}  # bytes over the budget at these ends, as far as they were traced
        at = max(min(step.seq_len // 64, limit // 64), 1)
        while too_long - fits > (close := max(fits // 50, 1)):
            at = max(fits + close, min(at, too_long - close))
            longer = with_kept(with_length(step, at * 64), kept)
            bytes_over = self.reserved_bytes(longer) - self.budget_bytes
            moved, stays = (fits, too_long) if bytes_over <= 0 else (too_long, fits)
            if moved in over and stays in over:
                over[stays] /= 2  # the Illinois rule: an end that stays for long leads astray
            over[at] = bytes_over
            fits, too_long = (at, too_long) if bytes_over <= 0 else (fits, at)
            at = _next_length(fits, too_long, over)
        return fits * 64


def _next_length(fits: int, too_long: int, over: dict[int, float]) -> int:
    """Between both ends on the line through them; a few times further, or half, while one is not known."""
    if too_long not in over:
        return 4 * fits
    if fits not in over:
        return too_long // 2
    return int(fits + (too_long - fits) * over[fits] / (over[fits] - over[too_long]))
