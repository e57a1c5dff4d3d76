"""Runs the engine's own training step under the recorder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowvram.engine.adapter_init import Means, initialise
from lowvram.engine.batch import Batch
from lowvram.engine.config import StepConfig
from lowvram.engine.host import Host
from lowvram.engine.linears import in_out_features, is_turned
from lowvram.engine.model import DTYPES
from lowvram.engine.step import SummedLoss, evaluate_batch, train_step
from lowvram.memory.kernels import cublas_bytes
from lowvram.memory.launches import no_launches_on_meta
from lowvram.memory.load import record_loading
from lowvram.memory.recorder import Recorder
from lowvram.memory.rig import OptimizerTwin, Rig, rig_for
from lowvram.memory.trace import ALLOC_ROUNDING, Backend, Capability, Trace
from lowvram.memory.weights import meta_batches

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def trace_step(
    config: PretrainedConfig, step: StepConfig, backend: Backend, capability: Capability = None
) -> Trace:
    """Loading, an evaluation pass, the adapter's initialisation if there is one, and one optimizer step.

    All at the plan's full shape; the optimizer's state is already there.

    In inference mode that is all but the optimizer step.

    Under accumulation the last micro-batch is traced: it is the worst, since the gradients of those before
    it live through its forward; they are put there first.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' deprecations; the user sees them when training
        launches = no_launches_on_meta() if step.levers.liger else nullcontext()
        with rig_for(config, step, backend, capability) as rig, launches:
            return _trace_on(rig, config, step, backend, capability)


def _trace_on(
    rig: Rig, config: PretrainedConfig, step: StepConfig, backend: Backend, capability: Capability
) -> Trace:
    recorder = Recorder(backend, ALLOC_ROUNDING if backend == "cuda" else 1)
    recorder.watch(rig.model, config.get_text_config().vocab_size)
    host = TracedHost(recorder, backend)
    loss_of = SummedLoss(rig.model, step, host)
    batches = meta_batches(step, getattr(config.get_text_config(), "sliding_window", None))
    record_loading(recorder, rig.model, backend)
    for n_bytes in cublas_bytes(capability) if backend == "cuda" else ():
        recorder.keep(n_bytes, "cublas workspace")
    with recorder, recorder.during("evaluation"):
        _evaluate(loss_of, batches)
    if not step.inference_mode:
        _initialise(recorder, loss_of, rig, step, batches, host)
        _record_training(recorder, loss_of, rig, step, batches)
    recorder.let_go()
    return recorder.trace


def _record_training(
    recorder: Recorder, loss_of: nn.Module, rig: Rig, step: StepConfig, batches: list[Batch]
) -> None:
    label_gradients(recorder, rig.parameters)
    with recorder.during("optimizer"):
        rig.optimizer(step).record_state(recorder)
    if step.levers.empty_cache:  # the step before did
        recorder.trace.empty_cache()
    if step.accumulation > 1:
        create_gradients(recorder, rig.parameters)
    with recorder, recorder.during("forward"):
        _run(recorder, loss_of, rig, step, batches)


class TracedHost(Host):
    """Host memory of a trace: beside a GPU it costs nothing, on a CPU it is memory like all other."""

    def __init__(self, recorder: Recorder, backend: Backend) -> None:
        super().__init__(torch.device("meta"))
        self._recorder, self._is_apart = recorder, backend == "cuda"

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with self.at_work():
            return torch.empty(shape, dtype=dtype, device="meta")

    def at_work(self) -> AbstractContextManager[None]:
        return self._recorder.aside() if self._is_apart else nullcontext()

    def to_device(self, made: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(made) if self._is_apart else made

    def added(self, total: torch.Tensor | None, made: torch.Tensor) -> torch.Tensor:
        self._recorder.label(made, "gradients")
        if total is not None or not self._is_apart:
            return made if total is None else total
        with self.at_work():
            return torch.empty_like(made)


def _evaluate(loss_of: nn.Module, batches: list[Batch]) -> None:
    loss_of.eval()
    for batch in batches:
        evaluate_batch(loss_of, batch)
    loss_of.train()


def _initialise(
    recorder: Recorder, loss_of: nn.Module, rig: Rig, step: StepConfig, batches: list[Batch], host: TracedHost
) -> None:
    """One micro-batch in one pass, as many as there may be: each leaves behind what the first one did."""

    def backward(loss: torch.Tensor) -> None:
        recorder.at("")
        recorder.trace.backward_starts.append(len(recorder.trace.events))
        loss.backward()  # type: ignore[no-untyped-call]
        recorder.at("")

    def original(name: str) -> torch.Tensor:  # -> [out, in]
        base: Any = rig.model.get_submodule(name).base_layer
        n_in, n_out = in_out_features(base)
        with host.at_work():
            shape = (n_in, n_out) if is_turned(base) else (n_out, n_in)
            return torch.empty(shape, dtype=DTYPES[step.compute_dtype], device="meta")

    with recorder, recorder.during("initialisation"):
        means = Means(host, 0, original, backward, enter=recorder.at)
        initialise(rig.model, loss_of, step, batches, means)
    recorder.at("")


def _run(recorder: Recorder, loss_of: nn.Module, rig: Rig, step: StepConfig, batches: list[Batch]) -> None:
    def backward(loss: torch.Tensor) -> None:
        with recorder.during("backward"):
            recorder.at("")
            loss.backward()  # type: ignore[no-untyped-call]

    def clip(parameters: Any, max_norm: float) -> torch.Tensor:
        with recorder.during("clip"):
            recorder.at("")
            return nn.utils.clip_grad_norm_(parameters, max_norm)

    optimizer: Any = _Optimizer(recorder, rig.optimizer(step), rig.parameters)
    train_step(loss_of, optimizer, batches, max_grad_norm=step.max_grad_norm, backward=backward, clip=clip)


@dataclass(frozen=True)
class _Optimizer:
    """As the step sees one: the twin updates, the model's own parameters lose their gradients."""

    recorder: Recorder
    twin: OptimizerTwin
    parameters: Mapping[str, nn.Parameter]

    def step(self) -> None:
        self.twin.step(self.recorder)

    def zero_grad(self, set_to_none: bool = True) -> None:
        assert set_to_none, "lowvram frees gradients"
        self.recorder.at("")
        for parameter in self.parameters.values():
            parameter.grad = None


def label_gradients(recorder: Recorder, parameters: Mapping[str, nn.Parameter]) -> None:
    """Tell gradients from other tensors as they are made."""

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        recorder.label(parameter.grad, "gradients")

    for parameter in parameters.values():
        recorder.hold(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]


def create_gradients(recorder: Recorder, parameters: Mapping[str, nn.Parameter]) -> None:
    """The gradients of earlier micro-batches."""
    for name, parameter in parameters.items():
        recorder.at(name)
        parameter.grad = torch.empty_like(parameter)
        recorder.label(parameter.grad, "gradients")
    recorder.at("")
