"""Runs the engine's own training step under the recorder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram.engine.adapters import trainable
from lowvram.engine.config import StepConfig
from lowvram.engine.optimizer import make_optimizer
from lowvram.engine.step import SummedLoss, evaluate_batch, train_step
from lowvram.memory.kernels import cublas_bytes
from lowvram.memory.load import record_loading
from lowvram.memory.recorder import Recorder
from lowvram.memory.trace import ALLOC_ROUNDING, Backend, Capability, Trace
from lowvram.memory.weights import meta_batch, meta_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def trace_step(
    config: PretrainedConfig, step: StepConfig, backend: Backend, capability: Capability = None
) -> Trace:
    """Loading, an evaluation pass and one optimizer step at the plan's full shape, its state already there.

    Under accumulation the last micro-batch is traced: it is the worst, since the gradients of those before
    it live through its forward; they are put there first.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' deprecations; the user sees them when training
        model = meta_model(config, step, backend, capability)
        recorder = Recorder(backend, ALLOC_ROUNDING if backend == "cuda" else 1)
        recorder.watch(model, config.get_text_config().vocab_size)
        loss_of = SummedLoss(model, step)
        parameters = trainable(model)
        record_loading(recorder, model, backend)
        for n_bytes in cublas_bytes(capability) if backend == "cuda" else ():
            recorder.keep(n_bytes, "cublas workspace")
        with recorder, recorder.during("evaluation"):
            _evaluate(loss_of, step)
        label_gradients(recorder, parameters)
        optimizer = OptimizerTwin(recorder, parameters, step)
        if step.accumulation > 1:
            create_gradients(recorder, parameters)
        with recorder, recorder.during("forward"):
            _run(recorder, loss_of, optimizer, step)
    return recorder.trace


def _evaluate(loss_of: nn.Module, step: StepConfig) -> None:
    loss_of.eval()
    evaluate_batch(loss_of, meta_batch(step))
    loss_of.train()


def _run(recorder: Recorder, loss_of: nn.Module, optimizer: OptimizerTwin, step: StepConfig) -> None:
    def backward(loss: torch.Tensor) -> None:
        with recorder.during("backward"):
            loss.backward()  # type: ignore[no-untyped-call]

    def clip(parameters: Any, max_norm: float) -> torch.Tensor:
        with recorder.during("clip"):
            recorder.at("")
            return nn.utils.clip_grad_norm_(parameters, max_norm)

    batch = meta_batch(step)
    twin: Any = optimizer
    train_step(loss_of, twin, [batch], max_grad_norm=step.max_grad_norm, backward=backward, clip=clip)


class OptimizerTwin:
    """Runs the plan's optimizer on fake twins of the parameters.

    Optimizers look at the device of what they update and refuse the meta device; a fake tensor says that it
    is on the CPU. Only what the optimizer allocates is recorded, the twins are not.
    """

    def __init__(self, recorder: Recorder, parameters: Mapping[str, nn.Parameter], step: StepConfig) -> None:
        self._recorder = recorder
        self._parameters = parameters
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            self._twins = {n: nn.Parameter(torch.empty(p.shape)) for n, p in parameters.items()}
            shapes = {p.shape for p in parameters.values()}
            self._gradients = {shape: torch.empty(shape) for shape in shapes}  # only read: one does for all
        for name, twin in self._twins.items():
            recorder.exclude(twin)
            recorder.own(twin, name)
        for gradient in self._gradients.values():
            recorder.exclude(gradient)
        self._optimizer = make_optimizer(self._twins.values(), step, learning_rate=1e-4)
        self._create_state()

    def _create_state(self) -> None:
        """A first update makes the state, which every later step finds in memory."""
        with self._recorder:
            self.step()
        for state in self._optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    self._recorder.label(value, "optimizer_state")
        self._recorder.at("")

    def step(self) -> None:
        with self._recorder.during("optimizer"), self._mode:
            for twin in self._twins.values():
                twin.grad = self._gradients[twin.shape]
            self._recorder.at("")
            with self._recorder:
                self._optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        assert set_to_none, "lowvram frees gradients"
        self._recorder.at("")
        for parameter in self._parameters.values():
            parameter.grad = None


def label_gradients(recorder: Recorder, parameters: Mapping[str, nn.Parameter]) -> None:
    """Tell gradients from other tensors as they are made."""

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        recorder.label(parameter.grad, "gradients")

    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def create_gradients(recorder: Recorder, parameters: Mapping[str, nn.Parameter]) -> None:
    """The gradients of earlier micro-batches."""
    for name, parameter in parameters.items():
        recorder.at(name)
        parameter.grad = torch.empty_like(parameter)
        recorder.label(parameter.grad, "gradients")
    recorder.at("")
