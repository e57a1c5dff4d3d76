"""Rig: the model and optimizer that a trace runs on, built once for all steps that have them in common."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

_MOST_KEPT = 8  # a search goes to and fro between precisions and heads; a rig has no bytes of weights
_OF_OPTIMIZER = {"optimizer", "weight_decay", "lora_plus_ratio"}
# What a trace may change without building anew; the rest of a StepConfig decides modules.
_FREE = {"seq_len", "target_len", "micro_batch", "accumulation", "packing", "max_grad_norm", "init_batches"}
_FREE_LEVERS = {"loss_chunk_tokens", "kept_layers", "expandable_segments", "empty_cache"}


class OptimizerTwin:
    """The plan's optimizer on fake twins of the parameters.

    Optimizers look at the device of what they update and refuse the meta device; a fake tensor says that it
    is on the CPU. Only what the optimizer allocates is recorded, the twins are not.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], step: StepConfig) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            twins = {n: torch.empty(p.shape, dtype=p.dtype) for n, p in parameters.items()}
            self._twins = {n: nn.Parameter(twin) for n, twin in twins.items()}
            alike = {(twin.shape, twin.dtype): torch.empty_like(twin) for twin in twins.values()}
        for twin in self._twins.values():
            twin.grad = alike[twin.shape, twin.dtype]  # only read: one does for all
        self._optimizer = make_optimizer(self._twins, step, learning_rate=1e-4)
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
    """A traced model with adapters, its trainable parameters, and an optimizer of each kind asked for."""

    model: PeftModel
    parameters: dict[str, nn.Parameter]
    optimizers: dict[str, OptimizerTwin]

    def optimizer(self, step: StepConfig) -> OptimizerTwin:
        kind = step.model_dump_json(include=_OF_OPTIMIZER)
        if kind not in self.optimizers:
            self.optimizers[kind] = OptimizerTwin(self.parameters, step)
        return self.optimizers[kind]


_rigs: OrderedDict[str, Rig] = OrderedDict()


@contextmanager
def rig_for(
    config: PretrainedConfig, step: StepConfig, backend: Backend, capability: Capability
) -> Iterator[Rig]:
    """The caller's alone while the context lasts; then kept for the next step of a search.

    One that an error left in the middle of a step is not kept.
    """
    key = _key(config, step, backend, capability)
    rig = _rigs.pop(key, None)
    if rig is None:
        model = meta_model(config, step, backend, capability)
        rig = Rig(model, trainable(model), {})
    yield rig
    _rigs[key] = rig
    while len(_rigs) > _MOST_KEPT:
        _rigs.popitem(last=False)


def _key(config: PretrainedConfig, step: StepConfig, backend: Backend, capability: Capability) -> str:
    decide = set(StepConfig.model_fields) - _FREE - _OF_OPTIMIZER - {"levers"}
    fixed = step.model_dump(include=decide)  # of a Plan as well
    levers = step.levers.model_dump(exclude=_FREE_LEVERS)
    return f"{type(config)} {config.to_json_string(use_diff=False)} {fixed} {levers} {backend} {capability}"
