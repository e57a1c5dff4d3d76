"""StepRecord: what one optimizer step reports to the screen, to metrics.jsonl and to trackers."""

from __future__ import annotations

from lowvram.frozen import Frozen
from lowvram.training.machine import MachineSample


class StepRecord(Frozen):
    """One line of metrics.jsonl."""

    step: int  # 1-based, after the update
    total_steps: int
    epoch: float  # passes over the data, finished after the update
    loss: float  # mean over the step's trained tokens
    learning_rate: float
    grad_norm: float
    trained_tokens: int
    tokens: int  # with prompts, without padding
    seconds: float  # of this step
    tokens_per_second: float  # smoothed
    eta_seconds: float
    memory_now_bytes: int
    memory_peak_bytes: int
    memory_predicted_bytes: int
    memory_budget_bytes: int
    held_out_loss: float | None = None  # where an evaluation ran
    held_out_perplexity: float | None = None  # e to that; None too where no float holds it
    machine: MachineSample | None = None  # the newest look; lines of older versions have none

    def numbers(self) -> dict[str, float]:
        """What trackers plot, flat; the machine's under their own names."""
        plain = self.model_dump(exclude_none=True, exclude={"step", "total_steps", "machine"})
        return plain | (self.machine.numbers() if self.machine else {})
