"""RunResult: what a finished run achieved, result.json."""

from __future__ import annotations

from lowvram.frozen import Frozen


class RunResult(Frozen):
    """What the run achieved."""

    model: str
    data: str
    steps: int
    held_out_loss_before: float
    held_out_loss_after: float
    trained_tokens: int
    tokens: int
    seconds: float  # of training steps, without evaluation and loading
    tokens_per_second: float
    adapter_bytes: int
    stop_reason: str  # "finished"

    @property
    def improvement(self) -> float:
        """Share by which the held-out loss fell."""
        return 1.0 - self.held_out_loss_after / self.held_out_loss_before
