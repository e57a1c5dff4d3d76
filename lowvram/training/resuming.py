"""Between a run and its checkpoints: what is saved of it, and how it goes on from there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from lowvram.engine.adapter_start import adapter_state
from lowvram.engine.optimizer import restore_state
from lowvram.errors import ConfigError, refusals_of_the_system
from lowvram.frozen import write_atomically
from lowvram.memory.rung import Rung
from lowvram.planner.plan import Plan
from lowvram.shell import typed
from lowvram.training import checkpoint
from lowvram.training.checkpoint import CheckpointState
from lowvram.training.evaluation import Evaluations
from lowvram.training.plan_changes import HELD_OUT, Change, Known, changes
from lowvram.training.proof import prove
from lowvram.training.recovery import take
from lowvram.training.run import Run
from lowvram.training.run_folder import RunFolder
from lowvram.units import format_bytes


def require_whole(folder: RunFolder, start_over: bool) -> tuple[Path | None, list[str]]:
    """As `checkpoint.newest`. A run begins again at step 1 only where nothing was saved yet, or where
    `start_over` asks for it.

    Raises:
        ConfigError: there are checkpoints, and none of them is whole or may be read.
    """
    with refusals_of_the_system(f"{folder.checkpoints} cannot be read", "Ask its owner to let you read it."):
        newest, notes = checkpoint.newest(folder.checkpoints)
        steps = checkpoint.newest_step(folder.checkpoints)
    if newest is None and notes and not start_over:
        again = f"lowvram resume {typed(folder.path)}"
        raise ConfigError(
            f"{folder.path} cannot go on after step {steps}: no checkpoint can be used."
            + "".join(f"\n  {note}" for note in notes),
            f"Put one of them right, then: {again}; or lose all steps up to {steps} and begin again: "
            f"{again} --force",
        )
    return newest, notes


def go_on(run: Run, planned_levers: bool = False, start_over: bool = False) -> None:
    """Continue from the newest whole checkpoint, if there is one; what of the plan has changed is said.

    Whether it may change was asked at the door (pipeline.resume). The largest step is proved before anything
    of the checkpoint is taken over but its rungs.

    Args:
        planned_levers: its rungs are not taken over either.
        start_over: as `require_whole`, which is asked once more now that no other process can write here.
    """
    newest, notes = require_whole(run.folder, start_over)
    for note in notes:
        run.tell("checkpoint", f"{note}; it is kept with the ending .unread")
    saved = Plan.from_yaml(run.folder.plan_file) if run.folder.plan_file.exists() else None
    known = Known(0, (saved or run.plan).deciding, {})
    state = checkpoint.load(newest) if newest is not None else None
    if state is not None and not planned_levers:
        _take_rungs(run, state)
    prove(run)
    if newest is not None and state is not None:
        known = Known(state.step, state.extra["plan"], state.extra["counts"])
        _take_over(run, state)
        _require_best(run)
        run.checkpoint_bytes = checkpoint.n_bytes(newest)
    if newest is None and notes:
        lost = checkpoint.newest_step(run.folder.checkpoints)
        total = run.plan.total_steps
        run.tell("resume", f"Beginning again, as --force allows: {lost} of {total} steps are lost")
    checkpoint.set_aside(run.folder.checkpoints, newest)
    run.folder.drop_metrics_after(run.step)
    _tell_changes(run, changes(known, run.plan, run.counts))
    if saved != run.plan:  # it says from now on what is trained, and so does the next checkpoint
        write_atomically(run.folder.plan_file, run.plan.to_yaml())
    if newest is not None:
        run.tell("resume", f"Continuing after step {run.step} of {run.plan.total_steps}")


def _take_rungs(run: Run, state: CheckpointState) -> None:
    """How steps were run last; another plan is proved anew from its own levers on."""
    rungs = [Rung.model_validate(rung) for rung in state.extra["rungs"]]
    if rungs and state.plan_sha256 == run.plan.sha256:
        take(run, rungs)
        run.tell("resume", f"{len(rungs)} rungs below the plan, as before; up again with --planned-levers")


def _take_over(run: Run, state: CheckpointState) -> None:
    set_adapter(run, state.adapter)
    fresh = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    rates = run.scheduler.state_dict()["base_lrs"]
    restore_state(run.optimizer, state.optimizer)
    run.scheduler.load_state_dict(state.scheduler)
    if state.plan_sha256 != run.plan.sha256:
        _set_rates(run, fresh, rates, state.step)
    if run.accelerator.scaler is not None and state.extra["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(state.extra["scaler"])
    checkpoint.restore_rng(state.rng)
    run.step, run.loss_before = state.step, state.extra["loss_before"]
    run.same_held_out = state.extra.get("same_held_out", True)  # earlier versions say nothing
    run.tokens, run.trained_tokens = state.extra["tokens"], state.extra["trained_tokens"]
    run.seconds = state.extra["seconds"]
    run.evaluations = Evaluations(**state.extra["evaluations"])
    run.n_checkpoints = state.extra["n_checkpoints"]
    run.checkpoint_seconds = state.extra["checkpoint_seconds"]


def set_adapter(run: Run, values: Mapping[str, torch.Tensor]) -> None:
    """The adapter, and what it started from, as a checkpoint has them."""
    tensors = adapter_state(run.model)
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)


def _set_rates(run: Run, fresh: list[dict[str, object]], rates: list[float], step: int) -> None:
    """A changed plan's learning rate, schedule and weight decay, where the checkpoint has the old ones'."""
    for group, own in zip(run.optimizer.param_groups, fresh, strict=True):
        group.update(own)
    if step:  # the scheduler's next step computes the rate of this one, from the new plan's own rule
        known = run.scheduler.state_dict()
        run.scheduler.load_state_dict({**known, "base_lrs": rates, "last_epoch": step - 1})
        run.scheduler.step()


def _require_best(run: Run) -> None:
    """The best evaluation so far counts only as long as its adapter is there to be kept."""
    best = run.evaluations.best_step
    if not best or best == run.step:  # that one was read just now
        return
    path, problem = checkpoint.of_step(run.folder.checkpoints, best)
    if path is None:
        run.tell("checkpoint", f"{problem}; it was the best, which is now looked for from step {run.step} on")
        run.evaluations.forget_best(run.step)


def _tell_changes(run: Run, found: list[Change]) -> None:
    for change in found:
        run.tell("resume", f"Changed, as --force allows: {change.text}")
    if run.step and any(change.field in HELD_OUT for change in found):
        loss = "" if run.loss_before is None else f", the loss before training ({run.loss_before:.4f}) too"
        run.tell("resume", f"Held-out losses so far are of other examples{loss}: the best starts anew")
        run.evaluations, run.same_held_out = Evaluations(), False


def is_due(run: Run) -> bool:
    """Whether this step gets a checkpoint: in its turn, as the best so far, or as the run's last."""
    found, plan = run.evaluations, run.plan
    last = run.step == plan.total_steps or found.ends_run(plan.early_stop)
    return last or run.step % plan.save_every == 0 or found.best_step == run.step


def save(run: Run) -> None:
    """A checkpoint of the run as it is after a whole step; what the first one cost is said."""
    started = time.perf_counter()
    path = checkpoint.save(
        run.folder.checkpoints, _state(run), run.plan.keep_checkpoints, run.evaluations.best_step
    )
    seconds = time.perf_counter() - started
    run.checkpoint_bytes = checkpoint.n_bytes(path)
    run.n_checkpoints += 1
    run.checkpoint_seconds += seconds
    if run.n_checkpoints == 1:
        cost = f"A checkpoint takes {format_bytes(run.checkpoint_bytes)} and {seconds:.2f} s"
        run.tell("checkpoint", f"{cost}; the newest {run.plan.keep_checkpoints} and the best one stay")


def _state(run: Run) -> CheckpointState:
    scaler = run.accelerator.scaler  # of fp16 only
    return CheckpointState(
        step=run.step,
        epoch=(run.step - 1) // run.data.steps_per_epoch,  # of the step that was finished last
        step_in_epoch=run.step % run.data.steps_per_epoch,
        plan_sha256=run.plan.sha256,
        adapter={name: tensor.detach() for name, tensor in adapter_state(run.model).items()},
        optimizer=run.optimizer.state_dict(),
        scheduler=run.scheduler.state_dict(),
        rng=checkpoint.collect_rng(),
        extra={
            "loss_before": run.loss_before,
            "same_held_out": run.same_held_out,
            "tokens": run.tokens,
            "trained_tokens": run.trained_tokens,
            "seconds": run.seconds,
            "evaluations": run.evaluations.as_json(),
            "n_checkpoints": run.n_checkpoints + 1,  # with itself, whose seconds nobody knows yet
            "checkpoint_seconds": run.checkpoint_seconds,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "plan": run.deciding,
            "counts": run.counts,
            "rungs": [rung.model_dump(mode="json") for rung in run.rungs],
        },
    )
