"""Between a run and its checkpoints: what is saved of it, and how it goes on from there."""

from __future__ import annotations

import torch

from lowvram.engine.adapter_start import adapter_state
from lowvram.errors import ConfigError
from lowvram.training import checkpoint
from lowvram.training.run import Run


def go_on(run: Run) -> None:
    """Continue from the newest whole checkpoint, if there is one.

    Raises:
        ConfigError: it was written under another plan.
    """
    newest, notes = checkpoint.newest(run.folder.checkpoints)
    for note in notes:
        run.tell("checkpoint", note)
    if newest is None:
        run.folder.drop_metrics_after(0)
        return
    state = checkpoint.load(newest)
    if state.plan_sha256 != run.plan.sha256:
        raise ConfigError(
            f"{newest} was written under another plan.", "Restore plan.yaml, or start a new run elsewhere."
        )
    tensors = adapter_state(run.model)
    with torch.no_grad():
        for name, value in state.adapter.items():
            tensors[name].copy_(value)
    run.optimizer.load_state_dict(state.optimizer)
    run.scheduler.load_state_dict(state.scheduler)
    checkpoint.restore_rng(state.rng)
    run.step, run.loss_before = state.step, state.extra["loss_before"]
    run.tokens, run.trained_tokens = state.extra["tokens"], state.extra["trained_tokens"]
    run.seconds = state.extra["seconds"]
    run.folder.drop_metrics_after(run.step)
    run.tell("resume", f"Continuing after step {run.step} of {run.plan.total_steps}")


def save(run: Run, epoch: int) -> None:
    """A checkpoint of the run as it is after a whole step."""
    checkpoint.save(
        run.folder.checkpoints,
        checkpoint.CheckpointState(
            step=run.step,
            epoch=epoch,
            step_in_epoch=run.step % run.data.steps_per_epoch,
            plan_sha256=run.plan.sha256,
            adapter={name: tensor.detach() for name, tensor in adapter_state(run.model).items()},
            optimizer=run.optimizer.state_dict(),
            scheduler=run.scheduler.state_dict(),
            rng=checkpoint.collect_rng(),
            extra={
                "loss_before": run.loss_before,
                "tokens": run.tokens,
                "trained_tokens": run.trained_tokens,
                "seconds": run.seconds,
            },
        ),
    )
