"""The training loop: one visible function on accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, set_seed
from torch import nn
from transformers import get_scheduler

from lowvram.engine.adapter_start import adapter_state
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.model import load
from lowvram.engine.optimizer import make_optimizer
from lowvram.engine.source import ModelSource
from lowvram.engine.step import StepResult, SummedLoss, evaluate, train_step
from lowvram.errors import ConfigError, OutOfMemoryError, StoppedError
from lowvram.planner.plan import Plan
from lowvram.training import checkpoint
from lowvram.training.data import PreparedData, TrainingData, training_data
from lowvram.training.finish import finish, held_out_before
from lowvram.training.live import View
from lowvram.training.metrics import StepRecord
from lowvram.training.monitor import MemoryMonitor, watched
from lowvram.training.result import RunResult
from lowvram.training.run_folder import RunFolder
from lowvram.training.signals import Interrupted, StopRequest, stop_on_signal
from lowvram.training.start import initialise_adapter
from lowvram.units import format_bytes


@dataclass
class Run:
    """Everything that lives while a plan is trained."""

    plan: Plan
    folder: RunFolder
    source: ModelSource
    view: View
    accelerator: Accelerator
    monitor: MemoryMonitor
    model: Any  # PeftModel
    loss_of: nn.Module
    optimizer: Any
    scheduler: Any
    data: TrainingData
    step: int = 0
    measured_steps: int = 0  # of this process; `step` counts those before a resume too
    largest_batch_tokens: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def held_out_loss(self) -> float:
        with self.monitor.during("evaluation"):
            return evaluate(self.loss_of, self.data.held_out_batches(), self.device)


def train(
    plan: Plan,
    folder: RunFolder,
    source: ModelSource,
    prepared: PreparedData,
    view: View,
    log_with: tuple[str, ...] = (),
    before: Callable[[Run], None] = lambda _: None,
    after: Callable[[Run], None] = lambda _: None,
) -> RunResult:
    """Train `plan` from its newest checkpoint (or from the start) to its last step.

    Args:
        before, after: called with the loaded model before the first and after the last step.

    Raises:
        StoppedError: a signal came; everything up to the last finished step is saved.
        OutOfMemoryError: the device is full; the last checkpoint is intact.
        ConfigError: the loss is not finite, or a checkpoint belongs to another plan.
    """
    view.start()
    monitor = MemoryMonitor(plan.device.backend)
    try:
        with stop_on_signal(view.note) as stop, folder.lock():
            run = _set_up(plan, folder, source, prepared, view, monitor, log_with)
            _resume(run)
            before(run)
            run.loss_before = held_out_before(run)
            initialise_adapter(run)
            with stop.deferred():
                _steps(run, stop)
            result = finish(run)
            after(run)
            run.accelerator.end_training()
            return result
    except Interrupted as interrupt:
        raise StoppedError(
            f"Stopped at once. {checkpoint.what_is_safe(folder.checkpoints)}",
            f"Continue with: lowvram resume {folder.path}",
            interrupt.signal_number,
        ) from interrupt
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"The device ran out of memory: predicted {format_bytes(plan.estimate.peak_reserved_bytes)}, "
            f"budget {format_bytes(plan.budget_bytes)}. {str(error).splitlines()[0]}",
            f"Close other programs on the GPU, then: lowvram resume {folder.path}",
        ) from error
    finally:
        monitor.stop()
        view.stop()


def _set_up(
    plan: Plan,
    folder: RunFolder,
    source: ModelSource,
    prepared: PreparedData,
    view: View,
    monitor: MemoryMonitor,
    log_with: tuple[str, ...],
) -> Run:
    accelerator = _accelerator(plan, folder, log_with)
    monitor.start()
    set_seed(plan.seed)
    tokenizer = source.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    data = training_data(plan, prepared, pad, _start_token(source))
    view.note(f"Loading {plan.model} in {plan.base_precision} on {accelerator.device}")
    model = add_adapters(load(source, plan, str(accelerator.device)), plan).train()
    loss_of = SummedLoss(model, plan)
    optimizer = make_optimizer(trainable(model), plan, plan.learning_rate)
    name = "constant_with_warmup" if plan.schedule == "constant" else plan.schedule
    scheduler = get_scheduler(name, optimizer, plan.warmup_steps, plan.total_steps)
    loss_of, optimizer = accelerator.prepare(loss_of, optimizer)
    monitor.enter("other")
    return Run(
        plan,
        folder,
        source,
        view,
        accelerator,
        monitor,
        model,
        loss_of,
        optimizer,
        scheduler,
        data,
    )


def _start_token(source: ModelSource) -> int | None:
    """What an encoder-decoder's decoder reads before its target: T5 takes its padding for that."""
    config = source.config
    if not config.is_encoder_decoder:
        return None
    return int(getattr(config, "decoder_start_token_id", None) or config.pad_token_id or 0)


def _accelerator(plan: Plan, folder: RunFolder, log_with: tuple[str, ...]) -> Accelerator:
    """Loss scaling for fp16, and no autocast: the model already computes in the planned dtype, as traced."""
    fp16 = plan.compute_dtype == "fp16"
    accelerator = Accelerator(
        cpu=plan.device.backend == "cpu",
        mixed_precision="fp16" if fp16 else "no",
        kwargs_handlers=[AutocastKwargs(enabled=False)],
        log_with=list(log_with) or None,
        project_dir=str(folder.path),
    )
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"{accelerator.num_processes} processes were started; lowvram trains on one GPU.",
            "Start it without accelerate launch or torchrun.",
        )
    if log_with:
        flat = plan.model_dump(mode="json", include={"rank", "alpha", "seq_len", "learning_rate", "seed"})
        accelerator.init_trackers("lowvram", config=flat)
    return accelerator


def _resume(run: Run) -> None:
    """Continue from the newest whole checkpoint, if there is one."""
    newest, notes = checkpoint.newest(run.folder.checkpoints)
    for note in notes:
        run.view.note(note)
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
    run.view.note(f"Continuing after step {run.step} of {run.plan.total_steps}")


def _steps(run: Run, stop: StopRequest) -> None:
    """Every optimizer step of the plan that is not done yet."""
    for epoch, micro_batches in run.data.steps_from(run.step):
        started = time.perf_counter()
        learning_rate = run.scheduler.get_last_lr()[0]
        result = _step(run, micro_batches)
        run.scheduler.step()
        loss = float(result.loss)
        _require_finite(run, loss, float(result.grad_norm))
        seconds = time.perf_counter() - started
        run.step += 1
        run.seconds += seconds
        run.tokens += sum(e.n_tokens for examples in micro_batches for e in examples)
        run.trained_tokens += result.trained_tokens
        _report(run, result, learning_rate, seconds, micro_batches)
        if stop or run.step % run.plan.save_every == 0 or run.step == run.plan.total_steps:
            _save(run, epoch)
        if stop:
            assert stop.signal_number is not None
            raise StoppedError(
                f"Stopped after step {run.step} of {run.plan.total_steps}; everything is saved.",
                f"Continue with: lowvram resume {run.folder.path}",
                stop.signal_number,
            )


def _step(run: Run, micro_batches: list[list[Any]]) -> StepResult:
    """One optimizer step, its memory measured phase by phase."""
    with run.monitor.during("forward"):
        batches = [run.data.collate(examples) for examples in micro_batches]
        run.largest_batch_tokens = max(run.largest_batch_tokens, *(b.limited_tokens for b in batches))
        result = train_step(
            run.loss_of,
            run.optimizer,
            batches,
            max_grad_norm=run.plan.max_grad_norm,
            empty_cache=run.plan.levers.empty_cache,
            **watched(run.monitor, run.accelerator.backward, run.accelerator.clip_grad_norm_),
        )
    run.measured_steps += 1
    return result


def _require_finite(run: Run, loss: float, grad_norm: float) -> None:
    """fp16's loss scaling skips single overflowing updates, so there only the loss must be finite."""
    fp16 = run.plan.compute_dtype == "fp16"
    if math.isfinite(loss) and (fp16 or math.isfinite(grad_norm)):
        return
    raise ConfigError(
        f"Step {run.step + 1}: the loss is {loss} and the gradient norm {grad_norm}; training stopped. "
        f"{checkpoint.what_is_safe(run.folder.checkpoints)}",
        f"Use a smaller --learning-rate than {run.plan.learning_rate:g}.",
    )


def _report(
    run: Run,
    result: StepResult,
    learning_rate: float,
    seconds: float,
    micro_batches: list[list[Any]],
) -> None:
    plan, left = run.plan, run.plan.total_steps - run.step
    evaluate_now = run.step % plan.evaluate_every == 0 or left == 0
    held_out = run.held_out_loss() if evaluate_now else None
    if left == 0:
        run.loss_after = held_out
    record = StepRecord(
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
        memory_predicted_bytes=plan.estimate.peak_reserved_bytes,
        memory_budget_bytes=plan.budget_bytes,
        held_out_loss=held_out,
    )
    run.folder.append_metrics(record)
    run.view.step(record)
    run.accelerator.log(record.model_dump(exclude_none=True, exclude={"step", "total_steps"}), step=run.step)


def _save(run: Run, epoch: int) -> None:
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
