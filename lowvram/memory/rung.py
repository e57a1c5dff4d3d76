"""Rung: one step down a run took when the device had less memory than the plan needs."""

from __future__ import annotations

from typing import Any, Literal

from lowvram.engine.config import StepConfig
from lowvram.frozen import Frozen
from lowvram.units import said

Moment = Literal["proof", "training", "evaluation"]


class Rung(Frozen):
    """What was changed, when and why; everything that is not named stayed."""

    at_step: int  # finished optimizer steps
    moment: Moment
    reason: str  # what the device said
    changes: dict[str, tuple[Any, Any]]  # setting -> before, after
    predicted_peak_reserved_bytes: int  # of the leaner step
    step: StepConfig  # the leaner step, whole

    @property
    def sentence(self) -> str:
        """`micro_batch 4 -> 2, kept_layers 12 -> 0`"""
        return ", ".join(f"{name} {said(a)} -> {said(b)}" for name, (a, b) in self.changes.items())
