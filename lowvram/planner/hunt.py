"""Hunt: the fastest candidate that fits, proven with few traces.

Memory grows along every lever, so one candidate that does not fit rules out all that take more. A guess by
arithmetic says which to trace next; it ends when each candidate that would be faster than the best is ruled
out by a trace, or is over the budget by more than the guess may be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lowvram.engine.config import StepConfig
from lowvram.memory.estimate import MemoryEstimate
from lowvram.planner.arithmetic import floor_bytes
from lowvram.planner.guess import Guess, Parts
from lowvram.planner.space import Candidate
from lowvram.units import MiB

_GAIN = 0.005  # less than this share of the time is no gain: no modelled time is as exact as that
_SURELY = 4.0  # standard deviations
_PAGES = 24 * MiB  # reserved bytes come in pages of 2 and 20 MiB: so much more a leaner step may take
_PAGES_OF_SMALL = 20  # and no more than that part of a small budget
Rank = tuple[float, tuple[int, ...]]


@dataclass
class _Open:
    """A candidate, and the largest choice of kept layers that is not ruled out; -1: all are."""

    candidate: Candidate
    parts: Parts
    top: int
    seconds_at: dict[int, float] = field(default_factory=dict)


@dataclass
class Hunt:
    """One search.

    Args:
        candidates: all of the space that the host's memory allows.
        seconds, estimate: time and memory of a step; the latter takes a fifth of a second and more.
        budget_bytes: what it may reserve.
    """

    candidates: Sequence[Candidate]
    seconds: Callable[[StepConfig], float]
    estimate: Callable[[StepConfig], MemoryEstimate]
    budget_bytes: int
    guess: Guess
    n_traced: int = 0

    def __post_init__(self) -> None:
        shape = self.guess.shape
        self._open = [
            _Open(one, self.guess.parts(one.step), len(one.kept) - 1)
            for one in self.candidates
            if floor_bytes(one.step, shape) <= self.budget_bytes
        ]
        self._best: StepConfig | None = None
        self._best_rank: Rank = (math.inf, ())

    def fastest(self) -> StepConfig | None:
        """The step of the least predicted time among all that fit, to half a percent; None: none does."""
        while (found := self._likely() or self._leanest()) is not None:
            self._look(*found)
        return self._best

    def _look(self, one: _Open, index: int) -> None:
        step = one.candidate.at(index)
        traced = self.estimate(step)
        self.n_traced += 1
        self.guess.learn(one.parts, self._layers(one, index), traced.peak_reserved_bytes)
        if traced.peak_reserved_bytes > self.budget_bytes:
            self._rule_out(one, index, traced)
        elif self._rank(one, index) < self._best_rank:
            self._best, self._best_rank = step, self._rank(one, index)

    def _layers(self, one: _Open, index: int) -> int:
        return self.guess.layers(one.candidate, index)

    def _rule_out(self, failed: _Open, index: int, traced: MemoryEstimate) -> None:
        """All that take no less: with as many layers kept or more, and no lever further along."""
        running = max((n for phase, n in traced.phases_bytes.items() if phase != "load"), default=0)
        everywhere = running > self.budget_bytes
        pages = min(_PAGES, self.budget_bytes // _PAGES_OF_SMALL)
        clearly = traced.peak_reserved_bytes > self.budget_bytes + pages
        layers = self._layers(failed, index)
        for one in self._open:
            same = everywhere or failed.candidate.loads_like(one.candidate)
            if one is failed or (clearly and same and failed.candidate.is_leaner(one.candidate)):
                while one.top >= 0 and self._layers(one, one.top) >= layers:
                    one.top -= 1

    def _rank(self, one: _Open, index: int) -> Rank:
        """Time first; of equals the one that moves the ladder's last levers least."""
        if index not in one.seconds_at:
            one.seconds_at[index] = self.seconds(one.candidate.at(index))
        return one.seconds_at[index], one.candidate.place[::-1]

    @property
    def _to_beat(self) -> Rank:
        return (1 - _GAIN) * self._best_rank[0], ()

    def _faster(self) -> list[_Open]:
        """Candidates that could still beat the best, from the most promising on."""
        alive = (one for one in self._open if one.top >= 0 and self._rank(one, one.top) < self._to_beat)
        return sorted(alive, key=lambda one: self._rank(one, one.top))

    def _likely(self) -> tuple[_Open, int] | None:
        """The fastest that seems to fit, if it would be the best."""
        found, rank = None, self._to_beat
        for one in self._faster():
            if self._rank(one, one.top) >= rank:
                break
            room = self.guess.room_for(one.parts, self.budget_bytes)
            index = next((i for i in range(one.top, -1, -1) if self._layers(one, i) <= room), -1)
            if index >= 0 and self._rank(one, index) < rank:
                found, rank = (one, index), self._rank(one, index)
        return found

    def _leanest(self) -> tuple[_Open, int] | None:
        """Of what would be faster and seems not to fit, what takes least: it speaks for most others."""
        found, least = None, math.inf
        for one in self._faster():
            index = next(i for i in range(one.top + 1) if self._rank(one, i) < self._to_beat)
            layers = self._layers(one, index)
            n_bytes = self.guess.bytes_of(one.parts, layers) - _SURELY * self.guess.deviation(
                one.parts, layers
            )
            if n_bytes < least:
                found, least = (one, index), n_bytes
        return None if least > self.budget_bytes else found
