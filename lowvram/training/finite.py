"""Stops a run whose numbers are none any more, before a checkpoint could hold them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lowvram.engine.adapter_start import adapter_state
from lowvram.engine.step import StepResult
from lowvram.errors import ConfigError
from lowvram.shell import typed
from lowvram.training import checkpoint

if TYPE_CHECKING:
    from lowvram.training.run import Run


def require_finite_step(run: Run, result: StepResult) -> None:
    """fp16's loss scaling skips single overflowing updates, so there only the loss must be finite.

    Raises:
        ConfigError: the loss or the gradients' norm is infinite or no number.
    """
    loss, grad_norm = float(result.loss), float(result.grad_norm)
    fp16 = run.plan.compute_dtype == "fp16"
    if not (math.isfinite(loss) and (fp16 or math.isfinite(grad_norm))):
        raise _stopped(run, run.step + 1, f"the loss is {loss} and the gradient norm {grad_norm}")


def require_finite_held_out(run: Run, loss: float) -> None:
    """Raises: ConfigError, if the held-out loss is infinite or no number."""
    if not math.isfinite(loss):
        raise _stopped(run, run.step, f"the held-out loss is {loss}")


def require_finite_start(run: Run, loss: float) -> None:
    """Of the untrained adapter, which changes nothing yet: a base that is no good in this precision.

    Raises:
        ConfigError: the held-out loss before training is infinite or no number.
    """
    if not math.isfinite(loss):
        raise ConfigError(
            f"Before training the held-out loss of {run.plan.model} is {loss}: its weights are damaged, or "
            f"too large for {run.plan.compute_dtype}.",
            "Fetch the model again, or plan with another --precision.",
        )


def require_finite_adapter(run: Run) -> None:
    """Asked before each save: a damaged adapter must not push the last good checkpoint out.

    Raises:
        ConfigError: a weight is infinite or no number.
    """
    for name, tensor in adapter_state(run.model).items():
        if not bool(torch.isfinite(tensor).all()):
            raise _stopped(run, run.step, f"{name} is no longer finite")


def _stopped(run: Run, step: int, what: str) -> ConfigError:
    return ConfigError(
        f"Step {step}: {what}; training stopped. {checkpoint.what_is_safe(run.folder.checkpoints)}",
        f"Set a smaller learning_rate than {run.plan.learning_rate:g} in {run.folder.plan_file}, then: "
        f"lowvram resume {typed(run.folder.path)} --force",
    )
