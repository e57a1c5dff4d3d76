"""Trial: lowvram's own step on a model with random weights, measured by lowvram's own monitor."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from gpu_check_model import config_of, full_batch, random_model
from gpu_check_rows import Row
from torch import nn

from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.optimizer import make_optimizer
from lowvram.engine.step import SummedLoss, evaluate, train_step
from lowvram.memory.estimate import MemoryEstimate, estimate
from lowvram.memory.profiled import profiled_peak_bytes
from lowvram.training.monitor import MemoryMonitor, watched
from lowvram.training.receipt import by_phase, whole_peak

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SELF_CHECK_STEP = StepConfig(  # float32: a CPU without bf16 takes ten times as long in it
    compute_dtype="fp32",
    rank=8,
    target_modules=ALL_LINEAR,
    seq_len=256,
    micro_batch=1,
    accumulation=2,
    levers=Levers(loss_chunk_tokens=128),
)
HEADS = ("streamed", "nf4", "int8")
_NO_SPEED = {"tokens_per_second": None, "modelled_tokens_per_second": None}


def _all_levers(**changes: int) -> Levers:
    return Levers(offload_checkpoints=True, embedding_on_host=True, head="streamed", **changes)


LONG_STEP = StepConfig(  # 8 tiles; a second a step of four of Qwen2-7B's layers on an H100
    rank=8,
    target_modules=ALL_LINEAR,
    seq_len=16_384,
    micro_batch=1,
    accumulation=1,
    levers=_all_levers(tile_tokens=2048, loss_chunk_tokens=256).model_copy(
        update={"expandable_segments": True}
    ),
)


class Trial:
    """A model on a device, ready to be stepped at any length."""

    def __init__(
        self, config: PretrainedConfig, step: StepConfig, device: str, monitor: MemoryMonitor
    ) -> None:
        self.device, self.monitor = device, monitor
        self._vocab_size = config.get_text_config().vocab_size
        model = add_adapters(random_model(config, step, device), step).train()
        self._loss_of = SummedLoss(model, step)
        self._parameters = trainable(model)
        self._optimizer = make_optimizer(self._parameters, step, 1e-4)
        monitor.enter("other")

    def step(self, step: StepConfig) -> float:
        """One optimizer step of at most two full micro-batches; its seconds.

        The second of an accumulation finds the gradients of the first, and those after it are like it.
        """
        return self._timed(step, min(step.accumulation, 2))

    def last_of(self, step: StepConfig) -> float:
        """Only the last micro-batch of a step, with the gradients of those before it put there."""
        if step.accumulation > 1:
            for parameter in self._parameters.values():
                parameter.grad = torch.zeros_like(parameter)
        return self._timed(step, 1)

    def evaluate(self, step: StepConfig) -> None:
        """The held-out loss of one full batch."""
        with self.monitor.during("evaluation"):
            evaluate(self._loss_of, [full_batch(step, self._vocab_size)], self.device)

    def clear(self) -> None:
        """As after loading: no gradients, nothing cached."""
        self._optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()

    def _timed(self, step: StepConfig, n_batches: int) -> float:
        self._synchronize()
        started = time.perf_counter()
        with self.monitor.during("forward"):
            batches = [full_batch(step, self._vocab_size) for _ in range(n_batches)]
            train_step(
                self._loss_of,
                self._optimizer,
                batches,
                max_grad_norm=step.max_grad_norm,
                **watched(self.monitor, torch.Tensor.backward, nn.utils.clip_grad_norm_),
            )
        self._synchronize()
        return time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def attempt(run: Callable[[], object]) -> str:
    """`ran`, or that memory did not suffice."""
    try:
        run()
    except torch.OutOfMemoryError:
        return "out of memory"
    return "ran"


def measured_rows(
    base: Row, predicted: MemoryEstimate | None, monitor: MemoryMonitor, context_bytes: int
) -> list[Row]:
    """What the monitor saw beside what was predicted: one row for all phases together, then one for each."""
    peaks = monitor.peaks()
    whole = whole_peak(peaks)
    known: dict[str, Any] = {}
    if predicted is not None:
        known = {
            "predicted_allocated_bytes": predicted.peak_allocated_bytes,
            "predicted_reserved_bytes": predicted.peak_reserved_bytes,
            "predicted_driver_bytes": predicted.peak_reserved_bytes + context_bytes,
        }
    measured = {
        f"measured_{name}_bytes": getattr(whole, name) for name in ("allocated", "reserved", "driver")
    }
    rows = [base.model_copy(update={"phase": "all", **known, **measured})]
    for phase, memory in by_phase(predicted.phases_bytes if predicted else {}, peaks).items():
        told = memory.model_dump(exclude={"measured_resident_bytes"})
        rows.append(base.model_copy(update={"phase": phase, **_NO_SPEED, **told}))
    return rows


def tiled_rows(emit: Callable[[Row], None], model: str, device: str, step: StepConfig) -> None:
    """A long step by tiles with every lever, once with each head: predicted beside measured."""
    for head in HEADS:
        trial_of = step.model_copy(update={"levers": step.levers.model_copy(update={"head": head})})
        capability = torch.cuda.get_device_capability(0) if device == "cuda" else None
        predicted = estimate(config_of(model), trial_of, "cuda" if device == "cuda" else "cpu", capability)
        base = Row(check="tiles", model=model, note=f"head={head}", **shape_of(trial_of))
        monitor, seconds = MemoryMonitor(device), [0.0]
        monitor.start()

        def run(
            step: StepConfig = trial_of, monitor: MemoryMonitor = monitor, into: list[float] = seconds
        ) -> None:
            trial = Trial(config_of(model), step, device, monitor)
            trial.evaluate(step)  # first, as training does
            into[:] = [trial.step(step) for _ in range(2)][1:]  # the second finds the optimizer's state

        outcome = attempt(run)
        monitor.stop()
        speed = round(step.seq_len * step.micro_batch / seconds[0], 1) if seconds[0] else None
        base = base.model_copy(update={"outcome": outcome, "tokens_per_second": speed})
        for row in measured_rows(base, predicted, monitor, 0):
            emit(row)
        gc.collect()
        torch.cuda.empty_cache()


def self_checks(emit: Callable[[Row], None]) -> None:
    """Without a GPU: the same path on the CPU, whole sequences and tiles."""
    tiles = SELF_CHECK_STEP.model_copy(update={"levers": _all_levers(tile_tokens=64, loss_chunk_tokens=128)})
    for step in (SELF_CHECK_STEP, tiles):
        emit(self_check(step))


def self_check(step: StepConfig) -> Row:
    """What torch's profiler saw against the prediction."""
    config = config_of("tiny")
    monitor = MemoryMonitor("cpu")
    monitor.start()

    def run() -> None:
        trial = Trial(config, step, "cpu", monitor)
        for _ in range(2):  # the second finds the optimizer's state in memory
            trial.step(step)

    measured = profiled_peak_bytes(run)
    monitor.stop()
    predicted = estimate(config, step, "cpu")
    return Row(
        check="self-check",
        model="tiny",
        phase="all",
        predicted_allocated_bytes=predicted.peak_allocated_bytes,
        measured_allocated_bytes=measured,
        **shape_of(step),
    )


def shape_of(step: StepConfig) -> dict[str, Any]:
    """The columns that say which step it was."""
    names = ("seq_len", "micro_batch", "rank", "optimizer")
    return {**{name: getattr(step, name) for name in names}, "levers": step.levers.model_dump()}
