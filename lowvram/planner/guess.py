"""Guess: a candidate's memory by arithmetic, set right by each trace; it only decides what is traced next."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from lowvram.engine.config import StepConfig
from lowvram.engine.shape import ModelShape
from lowvram.planner.arithmetic import floor_bytes, kept_bytes, working_bytes
from lowvram.planner.space import ALL, Candidate
from lowvram.units import GiB

_NOISE = 0.03 * GiB  # of a trace around the formula: pages, and which moment is the peak


class Parts(NamedTuple):
    """Bytes of one step by arithmetic."""

    floor: float
    working: float
    layer: float  # of one kept layer
    unsure: float  # part of `working` that is not there when layers are kept: their work is among the kept

    def of(self, layers: int) -> tuple[float, float, float]:
        return self.working, layers * self.layer, 1.0


@dataclass
class Guess:
    """Bytes = floor + a * working + b * kept layers' + c, with a, b and c normally distributed.

    Each trace narrows them (a Kalman filter's update), so that a guess knows how far off it may be.
    """

    shape: ModelShape
    mean: list[float] = field(default_factory=lambda: [1.0, 1.1, 0.1 * GiB])
    covariance: list[list[float]] = field(
        default_factory=lambda: [[0.5**2, 0, 0], [0, 0.4**2, 0], [0, 0, (0.2 * GiB) ** 2]]
    )

    def layers(self, candidate: Candidate, index: int) -> int:
        kept = candidate.kept[index]
        return self.shape.n_layers if kept == ALL else int(kept)

    def parts(self, step: StepConfig) -> Parts:
        """What stays the same through a search."""
        shape = self.shape
        work, logits = working_bytes(step, shape)
        floor, kept = floor_bytes(step, shape), kept_bytes(step, shape)
        return Parts(floor, max(work, logits), kept, max(work - logits, 0.0))

    def bytes_of(self, parts: Parts, layers: int) -> float:
        """The most likely bytes."""
        return parts.floor + sum(m * x for m, x in zip(self.mean, parts.of(layers), strict=True))

    def deviation(self, parts: Parts, layers: int) -> float:
        """Standard deviation of `bytes_of`."""
        x = parts.of(layers)
        return math.sqrt(_dot(x, self._spread(x)) + _noise(parts, layers) ** 2)

    def room_for(self, parts: Parts, budget_bytes: float) -> float:
        """Kept layers that seem to fit; below 0 when not even none does."""
        return (budget_bytes - self.bytes_of(parts, 0)) / max(self.mean[1] * parts.layer, 1.0)

    def learn(self, parts: Parts, layers: int, traced_bytes: int) -> None:
        """What a trace said."""
        x = parts.of(layers)
        spread, error = self._spread(x), traced_bytes - self.bytes_of(parts, layers)
        gain = [s / (_dot(x, spread) + _noise(parts, layers) ** 2) for s in spread]
        self.mean = [m + g * error for m, g in zip(self.mean, gain, strict=True)]
        self.covariance = [
            [c - g * s for c, s in zip(row, spread, strict=True)]
            for row, g in zip(self.covariance, gain, strict=True)
        ]

    def _spread(self, x: tuple[float, ...]) -> list[float]:
        return [_dot(row, x) for row in self.covariance]


def _noise(parts: Parts, layers: int) -> float:
    """Of a trace around the formula: four deviations are all that it may be off by."""
    return math.hypot(_NOISE, parts.unsure / 4 if layers else 0.0)


def _dot(left: Iterable[float], right: Iterable[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
