"""RunResult: what a finished run achieved, result.json."""

from __future__ import annotations

from lowvram.frozen import Frozen


class RunResult(Frozen):
    """What the run achieved."""

    model: str
    data: str
    steps: int
    held_out_loss_before: float
    held_out_loss_after: float  # of RUN/adapter
    same_held_out: bool = True  # False: --force went on with other data, `before` is of other examples
    held_out_perplexity_before: float | None = None  # e to the loss; None where no float holds it
    held_out_perplexity_after: float | None = None
    trained_tokens: int
    tokens: int
    seconds: float  # of training steps, without evaluation and loading
    tokens_per_second: float
    adapter_bytes: int
    adapter_sha256: str | None = None  # of its weights; a merge looks whether they are still those
    adapter_step: int | None = None  # whose adapter RUN/adapter is: the best by held-out loss
    checkpoint_bytes: int = 0  # of one
    n_checkpoints: int = 0
    checkpoint_seconds: float = 0.0  # of all, without the one that a resume began from
    stop_reason: str  # "finished", or "early stop after 3 evaluations without a better one than step 40's"

    @property
    def improvement(self) -> float | None:
        """Share by which the held-out loss fell; None where the two losses are of different examples."""
        if not self.same_held_out:
            return None
        return 1.0 - self.held_out_loss_after / self.held_out_loss_before
