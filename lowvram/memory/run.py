"""Runs the engine's own training step under the recorder."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram.engine.adapters import trainable
from lowvram.engine.config import StepConfig
from lowvram.engine.optimizer import make_optimizer
from lowvram.engine.step import SummedLoss, train_step
from lowvram.memory.fake import fake_batch, fake_model
from lowvram.memory.kernels import Backend
from lowvram.memory.trace import ALLOC_ROUNDING, Recorder, Trace

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def trace_step(config: PretrainedConfig, step: StepConfig, backend: Backend) -> Trace:
    """One optimizer step at the plan's full shape, with optimizer state already there.

    Under accumulation the last micro-batch is traced: it is the worst, since the gradients of those before
    it live through its forward; they are put there first.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' deprecations; the user sees them when training
        model = fake_model(config, step, mode)
        recorder = Recorder(backend, ALLOC_ROUNDING if backend == "cuda" else 1)
        recorder.watch(model, config.get_text_config().vocab_size)
        loss_of = SummedLoss(model, step)
        parameters = trainable(model)
        optimizer = make_optimizer(parameters.values(), step, learning_rate=1e-4)
        _label_weights(recorder, model)
        _label_gradients(recorder, parameters)
        with mode, recorder:
            _create_optimizer_state(recorder, optimizer, parameters)
            if step.accumulation > 1:
                _create_gradients(recorder, parameters)
            _run(recorder, loss_of, optimizer, step, mode)
    return recorder.trace


def _run(
    recorder: Recorder,
    loss_of: SummedLoss,
    optimizer: torch.optim.Optimizer,
    step: StepConfig,
    mode: FakeTensorMode,
) -> None:
    def backward(loss: torch.Tensor) -> None:
        with recorder.during("backward"):
            loss.backward()  # type: ignore[no-untyped-call]

    def clip(parameters: object, max_norm: float) -> torch.Tensor:
        with recorder.during("clip"):
            return nn.utils.clip_grad_norm_(parameters, max_norm)  # type: ignore[arg-type]

    with recorder.during("forward"):
        batches = [fake_batch(step, mode)]
        train_step(
            loss_of, optimizer, batches, max_grad_norm=step.max_grad_norm, backward=backward, clip=clip
        )


def _label_weights(recorder: Recorder, model: PeftModel) -> None:
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    for parameter in model.parameters():
        if parameter.requires_grad:
            component = "adapters"
        elif parameter is embedding:
            component = "embeddings"
        elif parameter is head:
            component = "head"
        else:
            component = "base_weights"
        recorder.label(parameter, component)
        for tensor in _quantization_tensors(parameter):
            recorder.label(tensor, "base_weights")
    for buffer in model.buffers():
        recorder.label(buffer, "base_weights")


def _quantization_tensors(parameter: nn.Parameter) -> list[torch.Tensor]:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    tensors = [state.absmax, state.code, state.offset]
    if state.state2 is not None:
        tensors += [state.state2.absmax, state.state2.code]
    return [t for t in tensors if t is not None]


def _label_gradients(recorder: Recorder, parameters: dict[str, nn.Parameter]) -> None:
    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        recorder.label(parameter.grad, "gradients")

    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _create_optimizer_state(
    recorder: Recorder, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> None:
    """One update from zero gradients, so that the traced step starts with its state in memory."""
    with recorder.during("optimizer"):
        _create_gradients(recorder, parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    recorder.label(value, "optimizer_state")


def _create_gradients(recorder: Recorder, parameters: dict[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
        recorder.label(parameter.grad, "gradients")
