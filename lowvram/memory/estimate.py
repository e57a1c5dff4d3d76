"""MemoryEstimate: the predicted peak of a step, by component, with the moment at which it happens."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

from lowvram.engine.config import StepConfig
from lowvram.frozen import Frozen
from lowvram.memory.allocator import replay_reserved
from lowvram.memory.kernels import Backend, cublas_bytes
from lowvram.memory.run import trace_step
from lowvram.memory.trace import Allocation, Trace

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Component = Literal[
    "base_weights",
    "embeddings",
    "head",
    "adapters",
    "gradients",
    "optimizer_state",
    "saved_activations",
    "recompute_working_set",
    "logits",
    "workspaces",
]
COMPONENTS: tuple[Component, ...] = Component.__args__  # type: ignore[attr-defined]


class MemoryEstimate(Frozen):
    """Predicted device memory of one step, before any margin."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_moment: str
    components_bytes: dict[str, int]  # sums to peak_allocated_bytes
    n_events: int  # allocations and frees that were traced


def estimate(
    config: PretrainedConfig,
    step: StepConfig,
    backend: Backend = "cuda",
    capability: tuple[int, int] | None = None,
) -> MemoryEstimate:
    """Trace the whole step and replay it through the allocator.

    Args:
        config: the model's config; weights are not needed.
        step: what is trained.
        backend: whose hidden kernel buffers and allocator to count.
        capability: the GPU's, for the size of cuBLAS's workspaces.
    """
    trace = trace_step(config, step, backend)
    workspace = cublas_bytes(capability) if backend == "cuda" else 0
    peak_bytes, at = peak_of(trace)
    components = _components_at(trace, at)
    components["workspaces"] = components.get("workspaces", 0) + workspace
    return MemoryEstimate(
        peak_allocated_bytes=peak_bytes + workspace,
        peak_reserved_bytes=_reserved(trace, step, backend) + workspace,
        peak_moment=_moment(trace, at),
        components_bytes={c: components[c] for c in COMPONENTS if components.get(c)},
        n_events=len(trace.events),
    )


def quick_reserved_bytes(
    config: PretrainedConfig,
    step: StepConfig,
    backend: Backend = "cuda",
    capability: tuple[int, int] | None = None,
) -> int:
    """The peak reserved bytes from 2 and 3 layers, extended to all: for the planner's search.

    Memory is affine in the number of identical layers for one moment of the step, but another moment may
    become the peak, so the peak of each moment is extended by itself. `estimate` is the judge.
    """
    n_layers = int(config.get_text_config().num_hidden_layers)
    workspace = cublas_bytes(capability) if backend == "cuda" else 0
    if n_layers <= 3:
        trace = trace_step(config, step, backend)
        return _reserved(trace, step, backend) + workspace
    two, three = (trace_step(_with_layers(config, n), step, backend) for n in (2, 3))
    low, high = _peaks_by_moment(two), _peaks_by_moment(three)
    allocated = max(high[m] + (n_layers - 3) * (high[m] - low.get(m, high[m])) for m in high)
    waste = max(_reserved(t, step, backend) - peak_of(t)[0] for t in (two, three))
    return allocated + waste + workspace


def _with_layers(config: PretrainedConfig, n_layers: int) -> PretrainedConfig:
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = n_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:n_layers]
    return small


def _peaks_by_moment(trace: Trace) -> dict[tuple[str, int, str], int]:
    """Peak bytes of each (phase, micro-batch, outside layers/first/last); inner layers lie between these."""
    peaks: dict[tuple[str, int, str], int] = {}
    layers = [_layer_of(a.module) for a in trace.allocations]
    last = max(layers)
    live = 0
    for event in trace.events:
        index = abs(event) - 1
        allocation = trace.allocations[index]
        live += allocation.n_bytes if event > 0 else -allocation.n_bytes
        place = {-1: "outside", 0: "first", last: "last"}.get(layers[index])
        if place is None:
            continue
        micro_batch = sum(start < allocation.born for start in trace.backward_starts)
        key = (allocation.phase, micro_batch, place)
        if event > 0 and live > peaks.get(key, 0):
            peaks[key] = live
    return peaks


def _layer_of(module: str) -> int:
    """3 for "...layers.3.mlp.up_proj"; -1 outside the layers."""
    parts = module.split(".")
    numbers = [int(p) for p in parts if p.isdigit()]
    return numbers[0] if numbers else -1


def _reserved(trace: Trace, step: StepConfig, backend: Backend) -> int:
    if backend == "cpu":
        return peak_of(trace)[0]
    sizes = [a.n_bytes for a in trace.allocations]
    return replay_reserved(trace.events, sizes, step.levers.expandable_segments)


def peak_of(trace: Trace) -> tuple[int, int]:
    """Most bytes alive at one time, and the index of the event that reached it."""
    live = peak = at = 0
    for index, event in enumerate(trace.events):
        allocation = trace.allocations[abs(event) - 1]
        live += allocation.n_bytes if event > 0 else -allocation.n_bytes
        if live > peak:
            peak, at = live, index
    return peak, at


def component_of(allocation: Allocation, trace: Trace) -> str:
    """Forward tensors that outlive the start of a backward are saved activations; the rest is working set."""
    if allocation.component is not None:
        return allocation.component
    if allocation.phase in ("forward", "load"):
        died = len(trace.events) if allocation.died is None else allocation.died
        if any(allocation.born < start <= died for start in trace.backward_starts):
            return "saved_activations"
    return "recompute_working_set"


def _components_at(trace: Trace, at: int) -> dict[str, int]:
    components: dict[str, int] = {}
    for allocation in trace.allocations:
        if allocation.born <= at and (allocation.died is None or allocation.died > at):
            name = component_of(allocation, trace)
            components[name] = components.get(name, 0) + allocation.n_bytes
    return components


def _moment(trace: Trace, at: int) -> str:
    last = trace.allocations[abs(trace.events[at]) - 1]
    module = last.module.replace("model.base_model.model.", "").removeprefix("base_model.model.")
    op = last.op.removesuffix(".default")
    return f"{last.phase}, {module or 'start'}, {op}"
