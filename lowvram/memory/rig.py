"""Rig: the model and optimizer that a trace runs on, built once for all steps that have them in common."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram.engine.adapters import trainable
from lowvram.engine.config import StepConfig
from lowvram.engine.optimizer import make_optimizer
from lowvram.memory.recorder import Recorder
from lowvram.memory.trace import Backend, Capability
from lowvram.memory.weights import meta_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MOST_KEPT = 2
# What a trace may change without building anew; the rest of a StepConfig decides modules or optimizer state.
_FREE = {"seq_len", "target_len", "micro_batch", "accumulation", "max_grad_norm"}
_FREE_LEVERS = {"loss_chunk_tokens", "expandable_segments"}


class OptimizerTwin:
    """The plan's optimizer on fake twins of the parameters.

    Optimizers look at the device of what they update and refuse the meta device; a fake tensor says that it
    is on the CPU. Only what the optimizer allocates is recorded, the twins are not.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], step: StepConfig) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            self._twins = {n: nn.Parameter(torch.empty(p.shape)) for n, p in parameters.items()}
            shapes = {p.shape for p in parameters.values()}
            gradients = {shape: torch.empty(shape) for shape in shapes}  # only read: one does for all
        for twin in self._twins.values():
            twin.grad = gradients[twin.shape]
        self._optimizer = make_optimizer(self._twins.values(), step, learning_rate=1e-4)
        with self._mode:
            self._optimizer.step()  # makes the state, which every later step finds in memory

    def record_state(self, recorder: Recorder) -> None:
        """Its tensors, which are there before the step, and whose operators are whose."""
        for name, twin in self._twins.items():
            recorder.exclude(twin)
            recorder.own(twin, name)
            assert twin.grad is not None
            recorder.exclude(twin.grad)
            recorder.at(name)
            for value in self._optimizer.state[twin].values():
                if isinstance(value, torch.Tensor):
                    recorder.label(value, "optimizer_state")
        recorder.at("")

    def step(self, recorder: Recorder) -> None:
        with recorder.during("optimizer"), self._mode:
            recorder.at("")
            with recorder:
                self._optimizer.step()


@dataclass(frozen=True)
class Rig:
    """A traced model with adapters, its trainable parameters and their optimizer."""

    model: PeftModel
    parameters: dict[str, nn.Parameter]
    optimizer: OptimizerTwin


_rigs: OrderedDict[str, Rig] = OrderedDict()


def take_rig(config: PretrainedConfig, step: StepConfig, backend: Backend, capability: Capability) -> Rig:
    """A rig for this step: one that was put back, or a new one. It is the caller's alone until put back."""
    rig = _rigs.pop(_key(config, step, backend, capability), None)
    if rig is not None:
        return rig
    model = meta_model(config, step, backend, capability)
    parameters = trainable(model)
    return Rig(model, parameters, OptimizerTwin(parameters, step))


def put_back(
    rig: Rig, config: PretrainedConfig, step: StepConfig, backend: Backend, capability: Capability
) -> None:
    """Keep a rig, as it was taken, for the next step of a search."""
    _rigs[_key(config, step, backend, capability)] = rig
    while len(_rigs) > _MOST_KEPT:
        _rigs.popitem(last=False)


def _key(config: PretrainedConfig, step: StepConfig, backend: Backend, capability: Capability) -> str:
    fixed = step.model_dump(include=set(StepConfig.model_fields) - _FREE - {"levers"})  # of a Plan as well
    levers = step.levers.model_dump(exclude=_FREE_LEVERS)
    return f"{type(config)} {config.to_json_string(use_diff=False)} {fixed} {levers} {backend} {capability}"
