"""RunResult and Receipt: what a finished run reports, result.json and receipt.json."""

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


class Receipt(Frozen):
    """Predicted and measured memory of one run, side by side but never mixed."""

    device: str
    backend: str
    predicted_peak_allocated_bytes: int
    predicted_peak_reserved_bytes: int
    budget_bytes: int
    measured_peak_allocated_bytes: int | None
    measured_peak_bytes: int  # reserved on a GPU; resident since before loading on a CPU
    measured_load_peak_bytes: int
    versions: dict[str, str]
