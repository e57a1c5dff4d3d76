"""MemoryEstimate: the predicted peak of a step, by component, with the moment at which it happens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lowvram.engine.config import StepConfig
from lowvram.frozen import Frozen
from lowvram.gc_pause import no_collections
from lowvram.memory.allocator import replay_reserved
from lowvram.memory.layers import trace_repeating
from lowvram.memory.trace import Allocation, Backend, Capability, Trace

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Component = Literal[
    "base_weights",
    "embeddings",
    "head",
    "adapters",
    "gradients",
    "optimizer_state",
    "kv_cache",
    "saved_activations",
    "recompute_working_set",
    "logits",
    "workspaces",
]
COMPONENTS: tuple[Component, ...] = Component.__args__  # type: ignore[attr-defined]


class MemoryEstimate(Frozen):
    """Predicted device memory of one step, before any margin."""

    peak_allocated_bytes: int = Field(description="most bytes of tensors at one time")
    peak_reserved_bytes: int = Field(description="what torch's allocator takes from the device for them")
    peak_moment: str = Field(description="phase, module and operator at the peak")
    components_bytes: dict[str, int] = Field(description="what they are; sums to peak_allocated_bytes")
    phases_bytes: dict[str, int] = Field(  # peak allocated of each
        default_factory=dict,
        description="load, evaluation, initialisation, forward, backward, clip, optimizer; prefill, decode",
    )
    n_events: int = Field(description="allocations and frees that were traced")


def estimate(
    config: PretrainedConfig,
    step: StepConfig,
    backend: Backend = "cuda",
    capability: Capability = None,
) -> MemoryEstimate:
    """Trace the whole step and replay it through the allocator.

    Args:
        config: the model's config; weights are not needed.
        step: what is trained.
        backend: whose hidden kernel buffers and allocator to count.
        capability: the GPU's, for the size of cuBLAS's workspaces.
    """
    with no_collections():
        return estimate_of(trace_all_layers(config, step, backend, capability), step, backend)


def estimate_of(trace: Trace, step: StepConfig, backend: Backend) -> MemoryEstimate:
    """What a whole model's trace says."""
    peak_bytes, at = peak_of(trace)
    components = _components_at(trace, at)
    return MemoryEstimate(
        peak_allocated_bytes=peak_bytes,
        peak_reserved_bytes=_reserved(trace, step, backend),
        peak_moment=_moment(trace, at),
        phases_bytes=_peak_by_phase(trace),
        components_bytes={c: components[c] for c in COMPONENTS if components.get(c)},
        n_events=len(trace.events),
    )


def trace_all_layers(
    config: PretrainedConfig, step: StepConfig, backend: Backend, capability: Capability = None
) -> Trace:
    """The whole model's trace: extended from a few layers where they repeat, else of every layer."""
    from lowvram.memory.run import trace_step  # brings torch, which an estimate from disk does without

    def trace(some_layers: PretrainedConfig, kept_layers: int) -> Trace:
        levers = step.levers.model_copy(update={"kept_layers": kept_layers})
        return trace_step(some_layers, step.model_copy(update={"levers": levers}), backend, capability)

    return trace_repeating(config, trace, step.levers.kept_layers)


def _reserved(trace: Trace, step: StepConfig, backend: Backend) -> int:
    if backend == "cpu":
        return peak_of(trace)[0]
    sizes = [a.n_bytes for a in trace.allocations]
    return replay_reserved(trace.events, sizes, step.levers.expandable_segments)


def peak_of(trace: Trace) -> tuple[int, int]:
    """Most bytes alive at one time, and the index of the event that reached it."""
    live = peak = at = 0
    for index, change in enumerate(trace.changes_bytes()):
        live += change
        if live > peak:
            peak, at = live, index
    return peak, at


def _peak_by_phase(trace: Trace) -> dict[str, int]:
    peaks: dict[str, int] = {}
    live = 0
    for event, change in zip(trace.events, trace.changes_bytes(), strict=True):
        live += change
        if event > 0:
            phase = trace.allocations[event - 1].phase
            peaks[phase] = max(live, peaks.get(phase, 0))
    return peaks


def component_of(allocation: Allocation, trace: Trace) -> str:
    """Forward tensors that outlive the start of a backward are saved activations; the rest is working set."""
    if allocation.component is not None:
        return allocation.component
    if allocation.phase in ("forward", "load", "initialisation"):
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
