"""Receipt: predicted and measured memory of one finished run, side by side but never mixed."""

from __future__ import annotations

from typing import Literal

from lowvram.engine.config import StepConfig
from lowvram.frozen import Frozen
from lowvram.memory.rung import Rung

Phase = Literal["load", "initialisation", "forward", "backward", "clip", "optimizer", "evaluation", "other"]
PHASES: tuple[Phase, ...] = Phase.__args__  # type: ignore[attr-defined]
_FULL_SHAPE = 0.9  # seq_len is the longest example rounded up to 8 tokens: 50 tokens in 56 are 89 %


class PhaseMemory(Frozen):
    """The highest memory of one phase. None: nothing tells it here; a CPU has no allocator's counters."""

    predicted_allocated_bytes: int | None = None
    measured_allocated_bytes: int | None = None
    measured_reserved_bytes: int | None = None  # what the allocator took from the device; seldom shrinks
    measured_driver_bytes: int | None = None  # of this process: reserved, context and libraries
    measured_resident_bytes: int | None = None  # of the process since before loading, on a CPU only


class Receipt(Frozen):
    """One run's memory. The peaks are those of the phases but `other`, whose memory is not the plan's."""

    version: Literal[1] = 1  # of this file's format
    finished_at: str  # UTC, 2026-11-23T10:11:12+00:00
    model: str
    step: StepConfig
    device: str
    device_bytes: int
    backend: str
    budget_bytes: int
    predicted_peak_allocated_bytes: int
    predicted_peak_reserved_bytes: int
    predicted_context_bytes: int
    measured_peak_allocated_bytes: int | None
    measured_peak_reserved_bytes: int | None
    measured_peak_driver_bytes: int | None
    measured_peak_resident_bytes: int | None
    measured_context_bytes: int | None  # of the driver's bytes what the allocator did not take
    measured_held_bytes: int | None  # by the desktop and other processes, at the start
    measured_steps: int  # of the process that finished the run; those before a resume are not in it
    rungs: tuple[Rung, ...] = ()  # taken when memory ran out: the measured peaks are of leaner steps too
    largest_batch_tokens: int  # padding included; the prediction is for micro_batch * seq_len
    phases: dict[Phase, PhaseMemory]
    versions: dict[str, str]

    @property
    def comparable(self) -> bool:
        """Whether measured and predicted are about the same step, or measured is above what it may be.

        A run whose batches stayed small says nothing about the prediction for the full shape, unless even
        they needed more.
        """
        measured, predicted = self.measured_peak_reserved_bytes, self.predicted_peak_reserved_bytes
        if not measured or not predicted:
            return False
        full = self.step.micro_batch * self.step.seq_len
        as_planned = self.largest_batch_tokens >= _FULL_SHAPE * full and not self.rungs
        return as_planned or measured > predicted
