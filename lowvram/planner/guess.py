"""Guess: a candidate's memory by arithmetic, set right by each trace; it only decides what is traced next."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from lowvram.engine.config import StepConfig
from lowvram.engine.shape import ModelShape
from lowvram.planner.space import ALL, Candidate
from lowvram.units import GiB

_BYTES = {"nf4": 0.516, "int8": 1.0, "bf16": 2.0, "fp16": 2.0, "fp32": 4.0}  # a weight
_PLAIN_SCALES = 0.0465  # bytes a weight that double quantisation saves: 0.37 bits
_LOGIT_BYTES = 10  # of one token and one word: 16-bit logits, and their softmax and gradient in float32
_TILE_ROWS = 8192  # of a head that is read in tiles
_STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 2}
_NOISE = 0.03 * GiB  # of a trace around the formula: pages, and which moment is the peak


def resident_bytes(step: StepConfig, shape: ModelShape) -> float:
    """What is on the device all through a step: never more than its peak."""
    a_weight = _BYTES[step.base_precision]
    if step.base_precision == "nf4" and not step.levers.double_quantization:
        a_weight += _PLAIN_SCALES
    wide = 4 if step.compute_dtype == "fp32" else 2
    linear = sum(one.n_in * one.n_out * one.count for one in shape.linears)
    table = shape.vocab_size * shape.hidden_size
    head = {"16bit": wide, "int8": 1.0, "nf4": 0.516, "streamed": 0.0}[step.levers.head]
    ends = 0.0 if step.levers.embedding_on_host else table * wide
    if not (shape.tied and step.levers.head == "16bit"):
        ends += table * head
    adapters = shape.n_trainable(step.target_modules, step.rank) * (8 + _STATE_BYTES[step.optimizer])
    return linear * a_weight + shape.stacked_parameters * wide + ends + adapters


def kept_bytes(step: StepConfig, shape: ModelShape) -> float:
    """Of one layer's activations when they are kept: its linear layers' inputs and outputs, in 16 bits."""
    widths = sum((one.n_in + one.n_out) * one.count for one in shape.linears) / shape.n_layers
    return 2 * widths * step.micro_batch * step.seq_len


def passing_bytes(step: StepConfig, shape: ModelShape) -> float:
    """Inputs of all layers, and the larger of one layer's work and the logits."""
    inputs = 2 * shape.hidden_size * shape.n_layers * step.micro_batch * step.seq_len
    return (0 if step.levers.offload_checkpoints else inputs) + max(_working_bytes(step, shape))


def _working_bytes(step: StepConfig, shape: ModelShape) -> tuple[float, float]:
    """One layer's, and the logits'."""
    levers, tokens = step.levers, step.micro_batch * step.seq_len
    at_once = min(levers.tile_tokens or step.seq_len, step.seq_len) * step.micro_batch
    layer = 1.5 * kept_bytes(step, shape) * at_once / tokens
    words = shape.vocab_size if levers.head == "16bit" else min(_TILE_ROWS, shape.vocab_size)
    return layer, _LOGIT_BYTES * words * min(levers.loss_chunk_tokens, at_once)


class Parts(NamedTuple):
    """Bytes of one step by arithmetic."""

    resident: float
    passing: float
    layer: float  # of one kept layer
    unsure: float  # part of `passing` that is not there when layers are kept: their work is among the kept

    def of(self, layers: int) -> tuple[float, float, float]:
        return self.passing, layers * self.layer, 1.0


@dataclass
class Guess:
    """Bytes = resident + a * passing + b * kept layers' + c, with a, b and c normally distributed.

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
        work, logits = _working_bytes(step, shape)
        resident, passing = resident_bytes(step, shape), passing_bytes(step, shape)
        return Parts(resident, passing, kept_bytes(step, shape), max(work - logits, 0.0))

    def bytes_of(self, parts: Parts, layers: int) -> float:
        """The most likely bytes."""
        return parts.resident + sum(m * x for m, x in zip(self.mean, parts.of(layers), strict=True))

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
