"""The training loop: one visible function."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from lowvram.data.tokens import Example
from lowvram.engine.adapters import trainable
from lowvram.engine.source import ModelSource
from lowvram.engine.step import StepResult
from lowvram.errors import OutOfMemoryError, StoppedError, first_line
from lowvram.planner.plan import Plan
from lowvram.shell import typed
from lowvram.training import checkpoint
from lowvram.training.data import PreparedData
from lowvram.training.evaluation import perplexity
from lowvram.training.failures import told_as_ours
from lowvram.training.finish import finish, held_out_before
from lowvram.training.finite import require_finite_adapter, require_finite_held_out, require_finite_step
from lowvram.training.live import View
from lowvram.training.metrics import StepRecord
from lowvram.training.missing_evaluation import evaluate_missing
from lowvram.training.monitor import MemoryMonitor
from lowvram.training.proof import require_gradients, require_masked
from lowvram.training.recovery import NoRungLeftError, gave_up, recovering, whole_update
from lowvram.training.result import RunResult
from lowvram.training.resuming import go_on, is_due, save
from lowvram.training.run import Run
from lowvram.training.run_folder import RunFolder
from lowvram.training.set_up import set_up
from lowvram.training.signals import Interrupted, StopRequest, stop_on_signal
from lowvram.training.start import initialise_adapter
from lowvram.training.stepping import evaluated, evaluation_is_due, micro_batches_now, run_step
from lowvram.units import format_bytes

Hook = Callable[[Run], None]


def train(
    plan: Plan,
    folder: RunFolder,
    source: ModelSource,
    prepared: PreparedData,
    view: View,
    before: Hook = lambda _: None,
    after: Hook = lambda _: None,
    planned_levers: bool = False,
    start_over: bool = False,
) -> RunResult:
    """Train `plan` from its newest checkpoint (or from the start) to its last step.

    Args:
        before, after: called with the loaded model before the first and after the last step.
        planned_levers: go back up all rungs that the run had taken.
        start_over: begin again at step 1 where there are checkpoints, but none that can be used.

    Raises:
        StoppedError: a signal came; everything up to the last finished step is saved.
        OutOfMemoryError: the device is full, and no rung helped; the run is saved.
        ConfigError: the loss is not finite, or a checkpoint belongs to another plan.
        DeviceLostError, DoesNotFitError, ConfigError: as `failures.told_as_ours`.
    """
    view.start()
    monitor = MemoryMonitor(plan.device.backend)
    try:
        with stop_on_signal(view.note) as stop, folder.lock(), told_as_ours(folder):
            run = set_up(plan, folder, source, prepared, view, monitor)
            try:
                go_on(run, planned_levers, start_over)
                return _trained(run, stop, before, after)
            except NoRungLeftError as error:
                if run.step:
                    save(run)
                raise gave_up(run, error) from None
    except Interrupted as interrupt:
        raise StoppedError(
            f"Stopped at once. {checkpoint.what_is_safe(folder.checkpoints)}",
            f"Continue with: lowvram resume {typed(folder.path)}",
            interrupt.signal_number,
        ) from interrupt
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"The device ran out of memory: predicted {format_bytes(plan.estimate.peak_reserved_bytes)}, "
            f"budget {format_bytes(plan.budget_bytes)}. {first_line(error)}",
            f"Close other programs on the GPU, then: lowvram resume {typed(folder.path)}",
        ) from error
    finally:
        monitor.stop()
        view.stop()


def _trained(run: Run, stop: StopRequest, before: Hook, after: Hook) -> RunResult:
    before(run)
    run.loss_before = held_out_before(run)
    initialise_adapter(run)
    evaluate_missing(run)
    with stop.deferred():
        _steps(run, stop)
    result = finish(run)
    after(run)
    run.tell_machine()
    run.accelerator.end_training()
    return result


def _steps(run: Run, stop: StopRequest) -> None:
    """Every optimizer step of the plan that is not done yet, as far as no early stop ends them."""
    for _, micro_batches in run.data.steps_from(run.step):
        if run.evaluations.ends_run(run.plan.early_stop):
            return
        started = time.perf_counter()
        learning_rate = run.scheduler.get_last_lr()[0]
        result = _step(run, micro_batches)
        run.scheduler.step()
        require_finite_step(run, result)
        seconds = time.perf_counter() - started
        run.step += 1
        run.seconds += seconds
        run.tokens += sum(e.n_tokens for examples in micro_batches for e in examples)
        run.trained_tokens += result.trained_tokens
        _report(run, result, learning_rate, seconds, micro_batches)
        if stop or is_due(run):
            require_finite_adapter(run)
            save(run)
        if stop:
            assert stop.signal_number is not None
            raise StoppedError(
                f"Stopped after step {run.step} of {run.plan.total_steps}; everything is saved.",
                f"Continue with: lowvram resume {typed(run.folder.path)}",
                stop.signal_number,
            )


def _step(run: Run, planned: list[list[Example]]) -> StepResult:
    """One optimizer step, leaner where the device runs out of memory."""
    if not run.measured_steps:
        require_masked(run, planned)

    def attempt() -> StepResult:
        batches = list(micro_batches_now(run, planned))
        return run_step(run, batches, lambda: _update(run))

    result = recovering(run, "training", attempt)
    run.measured_steps += 1
    return result


def _update(run: Run) -> None:
    if not run.measured_steps:
        require_gradients(trainable(run.model), run.plan.target_modules)
    whole_update(run.optimizer, run.device)


def _report(
    run: Run,
    result: StepResult,
    learning_rate: float,
    seconds: float,
    micro_batches: list[list[Example]],
) -> None:
    """Evaluate the step where that is due, and say what it did."""
    held_out = None
    try:
        if evaluation_is_due(run):
            held_out = evaluated(run)
            require_finite_held_out(run, held_out)
    except NoRungLeftError:  # the step itself is done and will be saved: a resume makes its evaluation
        run.folder.append_metrics(_record(run, result, learning_rate, seconds, micro_batches, None))
        raise
    record = _record(run, result, learning_rate, seconds, micro_batches, held_out)
    run.folder.append_metrics(record)
    run.view.step(record)
    run.accelerator.log(record.numbers(), step=run.step)
    run.tell_machine()


def _record(
    run: Run,
    result: StepResult,
    learning_rate: float,
    seconds: float,
    micro_batches: list[list[Example]],
    held_out: float | None,
) -> StepRecord:
    plan, left = run.plan, run.plan.total_steps - run.step
    return StepRecord(
        step=run.step,
        total_steps=plan.total_steps,
        epoch=run.step / run.data.steps_per_epoch,
        loss=float(result.loss),
        learning_rate=learning_rate,
        grad_norm=float(result.grad_norm),
        trained_tokens=result.trained_tokens,
        tokens=sum(e.n_tokens for examples in micro_batches for e in examples),
        seconds=seconds,
        tokens_per_second=run.tokens / run.seconds,
        eta_seconds=left * run.seconds / run.step,
        memory_now_bytes=run.monitor.now_bytes,
        memory_peak_bytes=run.monitor.peak_bytes,
        memory_predicted_bytes=run.predicted_bytes,
        memory_budget_bytes=plan.budget_bytes,
        held_out_loss=held_out,
        held_out_perplexity=perplexity(held_out),
        machine=run.monitor.machine,
    )
