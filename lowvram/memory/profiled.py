"""What torch's profiler sees a really executed CPU step allocate: the truth that a trace is held to."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lowvram.engine.adapters import trainable
from lowvram.engine.batch import Batch
from lowvram.engine.config import StepConfig
from lowvram.engine.optimizer import make_optimizer
from lowvram.engine.step import SummedLoss, train_step


def executed_step_bytes(model: Any, step: StepConfig, make_batches: Callable[[], Sequence[Batch]]) -> int:
    """Most bytes of what a steady training step allocates, beyond weights and optimizer state.

    Args:
        model: on the CPU, adapted, in training mode.
        make_batches: the step's micro-batches, which count as its own.
    """
    loss_of, parameters = SummedLoss(model, step), trainable(model)
    optimizer = make_optimizer(parameters, step, 1e-4)
    _make_state(optimizer, parameters.values())
    gc.collect()  # before, or it would count as freed by the step

    def run() -> None:
        train_step(loss_of, optimizer, make_batches(), max_grad_norm=step.max_grad_norm)

    return profiled_peak_bytes(run)


def _make_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """A step over zeros, after which the state is there as in every later step."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def profiled_peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes alive at one time of what `run` allocates."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    seen: Any = profile.profiler
    events = [e for e in seen.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
