"""InferencePlan: at what precision, context and batch a model answers within its budget, or a refusal."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lowvram.engine.config import BasePrecision, StepConfig
from lowvram.engine.inference_config import InferenceStep
from lowvram.engine.shape import ModelShape
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, DoesNotFitError
from lowvram.gc_pause import no_collections
from lowvram.hardware import Hardware
from lowvram.memory.cache import RememberedModel
from lowvram.memory.inference_estimate import InferenceEstimate
from lowvram.memory.trace import Backend
from lowvram.planner.host_memory import host_bytes
from lowvram.planner.levers import compute_dtype, sixteen_bit
from lowvram.planner.plan import PlannedDevice
from lowvram.planner.profiles import budget, profile_for
from lowvram.planner.refusal import card_for
from lowvram.units import format_bytes

if TYPE_CHECKING:
    from lowvram.engine.adapter_folder import AdapterFolder

LEAST_CONTEXT = 2048  # tokens that are made room for where nobody asked and there is room
_UNIT = 128  # tokens: contexts that are tried are multiples of it
MOST_ROWS = 32  # of a batch that nobody asked for
_LEANER: tuple[BasePrecision, ...] = ("int8", "nf4")


class InferencePlan(InferenceStep):
    """What answering takes: made before a weight is read."""

    model: str = Field(description="folder or hub id")
    adapters: tuple[str, ...] = Field((), description="loaded with it, one of them on at a time")
    device: PlannedDevice = Field(description="for which the plan was made")
    budget_bytes: int = Field(description="device memory that may be reserved")
    estimate: InferenceEstimate = Field(description="predicted by running the same code on meta tensors")
    reason: str = Field(description="why this precision and this context")

    @property
    def fits(self) -> bool:
        return self.estimate.peak_reserved_bytes <= self.budget_bytes

    @property
    def summary(self) -> str:
        """The plan in one line."""
        cache = format_bytes(self.estimate.kv_cache_bytes)
        rows = f" in each of {self.batch} rows" if self.batch > 1 else ""
        return (
            f"{self.base_precision} base, {self.context:,} tokens of context{rows}: "
            f"{format_bytes(self.estimate.peak_reserved_bytes)} of {format_bytes(self.budget_bytes)} "
            f"on {self.device.name}, {cache} of it for keys and values ({self.reason})"
        )


@dataclass(frozen=True)
class InferenceRequest:
    """Everything that an inference plan is made from."""

    source: ModelSource
    hardware: Hardware
    adapters: Sequence[AdapterFolder] = ()
    trained: StepConfig | None = None  # the run's own step, where one is known
    precision: BasePrecision | None = None  # asked for
    context: int | None = None  # asked for
    batch: int | None = 1  # None: as many rows as fit, up to `rows`
    rows: int = 1
    say: Callable[[str], None] = lambda _: None
    _known: dict[InferenceStep, InferenceEstimate] = field(default_factory=dict)

    @cached_property
    def shape(self) -> ModelShape:
        return RememberedModel(self.source).shape

    @property
    def whole_vocabulary(self) -> bool:
        """Whether an adapter needs embedding and head as transformers has them, on the device."""
        return any(adapter.on_vocabulary for adapter in self.adapters)

    @property
    def budget_bytes(self) -> int:
        return budget(self.hardware, profile_for(self.hardware))

    def estimate(self, step: InferenceStep) -> InferenceEstimate:
        """Traced once each."""
        from lowvram.memory.inference import inference_estimate

        if step not in self._known:
            self.say(f"tracing {step.batch} x {step.context:,} tokens on a {step.base_precision} base")
            backend: Backend = "cpu" if self.hardware.backend == "cpu" else "cuda"
            with no_collections():
                self._known[step] = inference_estimate(
                    self.source.config, step, self.adapters, backend, self.hardware.capability
                )
        return self._known[step]

    def fits(self, step: InferenceStep) -> bool:
        on_host = host_bytes(step.model_step, self.shape) <= self.hardware.host_free_bytes
        room = on_host or self.hardware.backend == "cpu"
        return room and self.estimate(step).peak_reserved_bytes <= self.budget_bytes


def plan_inference(request: InferenceRequest) -> InferencePlan:
    """Decide precision, context and batch. No weights are read.

    Raises:
        ConfigError: a context that the model does not know, or an adapter of another base.
        DoesNotFitError: what was asked for, with both numbers and the nearest that fits.
    """
    from lowvram.memory.inference import require_adapters_fit

    _require_known_context(request)
    step = _first_step(request)
    require_adapters_fit(request.source.config, step, request.adapters)
    step, reason = _decided(request, step)
    return InferencePlan(
        **step.model_dump(),
        model=request.source.name,
        adapters=tuple(adapter.name for adapter in request.adapters),
        device=PlannedDevice.model_validate(
            {name: getattr(request.hardware, name) for name in PlannedDevice.model_fields}
        ),
        budget_bytes=request.budget_bytes,
        estimate=request.estimate(step),
        reason=reason,
    )


def _require_known_context(request: InferenceRequest) -> None:
    limit = request.shape.context_limit
    if request.context is not None and request.context > limit:
        raise ConfigError(
            f"{request.context:,} tokens of context are asked for, and the model knows {limit:,} positions.",
            f"Ask for at most {limit}.",
        )


def _first_step(request: InferenceRequest) -> InferenceStep:
    """As the run was trained, on this device; with room for the context that was asked for."""
    trained, hardware = request.trained, request.hardware
    on_card = hardware.backend in ("cuda", "rocm")
    precision = request.precision or (trained.base_precision if trained else _usual(hardware))
    levers = trained.levers if trained and not request.whole_vocabulary else StepConfig().levers
    own = {"double_quantization": (trained or StepConfig()).levers.double_quantization}
    if on_card:
        own |= {"embedding_on_host": levers.embedding_on_host}
    head = levers.head if on_card or levers.head != "streamed" else "16bit"
    return InferenceStep(
        base_precision=precision,
        compute_dtype=compute_dtype(precision, hardware),
        context=min(_wanted(request), request.shape.context_limit),
        batch=request.batch or 1,
        head=head,
        expandable_segments=on_card and platform.system() == "Linux",
        **own,
    )


def _usual(hardware: Hardware) -> BasePrecision:
    """Where no run says how it was trained: 4 bits on a card, what a CPU computes in else."""
    return sixteen_bit(hardware) if hardware.backend == "cpu" else "nf4"


def _wanted(request: InferenceRequest) -> int:
    trained_len = request.trained.seq_len if request.trained else 0
    return request.context or max(trained_len, LEAST_CONTEXT)


def _decided(request: InferenceRequest, step: InferenceStep) -> tuple[InferenceStep, str]:
    precision = _why_precision(request)
    for one in _with_levers(request, step):
        if request.fits(one):
            moved = "" if one == step else "; the embedding stays in host memory, or it would not fit"
            return _widest(request, one), f"{precision}, {_why_context(request)}{moved}"
    leanest = _with_levers(request, step)[-1]
    shorter = _longest_context(request, leanest)
    if request.context is None and shorter:
        return _with(leanest, context=shorter), f"{precision}, context: the longest that fits"
    raise _refusal(request, leanest, shorter)


def _with_levers(request: InferenceRequest, step: InferenceStep) -> list[InferenceStep]:
    """The step, and where that is possible with the embedding in host memory: a row a token travels."""
    on_card = request.hardware.backend != "cpu"
    possible = on_card and not (request.whole_vocabulary or (request.shape.tied and step.head == "16bit"))
    return [step, _with(step, embedding_on_host=True)] if possible and not step.embedding_on_host else [step]


def _with(step: InferenceStep, **changes: Any) -> InferenceStep:
    return step.model_copy(update=changes)


def _widest(request: InferenceRequest, step: InferenceStep) -> InferenceStep:
    """As many rows at one time as fit, where nobody said how many."""
    if request.batch is not None:
        return step
    rows = min(request.rows, MOST_ROWS)
    while rows > 1 and not request.fits(_with(step, batch=rows)):
        rows = -(-rows // 2)
    return _with(step, batch=rows)


def _longest_context(request: InferenceRequest, step: InferenceStep) -> int:
    """Of those that are shorter, to 128 tokens or 2 %; 0 when not even 128 fit.

    Memory grows nearly on a line, so that the next guess lies on the line between the ends that are known.
    """

    def at(units: int) -> InferenceStep:
        return _with(step, context=units * _UNIT)

    fits, too_long = 1, -(-step.context // _UNIT)
    if too_long <= 1 or not request.fits(at(1)):
        return 0
    while too_long - fits > max(1, fits // 50):
        low, high = (request.estimate(at(units)).peak_reserved_bytes for units in (fits, too_long))
        share = (request.budget_bytes - low) / max(high - low, 1)
        guess = min(max(fits + int(share * (too_long - fits)), fits + 1), too_long - 1)
        fits, too_long = (guess, too_long) if request.fits(at(guess)) else (fits, guess)
    return fits * _UNIT


def _why_precision(request: InferenceRequest) -> str:
    if request.precision is not None:
        return "precision: as you asked"
    if request.trained is not None:
        return "precision: as trained"
    return f"precision: the usual one {'here' if request.hardware.backend == 'cpu' else 'on a card'}"


def _why_context(request: InferenceRequest) -> str:
    if request.context is not None:
        return "context: as asked for"
    own = request.trained.seq_len if request.trained else 0
    limit = request.shape.context_limit
    if limit <= max(own, LEAST_CONTEXT):
        return "context: all that the model knows"
    return "context: the run's" if own >= LEAST_CONTEXT else "context: the default"


def _refusal(request: InferenceRequest, step: InferenceStep, shorter: int) -> DoesNotFitError:
    needed = request.estimate(step).peak_reserved_bytes
    rows = f" in each of {step.batch} rows" if step.batch > 1 else ""
    message = (
        f"Answering with {step.context:,} tokens of context{rows} on a {step.base_precision} base needs "
        f"{format_bytes(needed)}, the budget is {format_bytes(request.budget_bytes)} of "
        f"{request.hardware.name}."
    )
    if needed <= request.budget_bytes:
        free = format_bytes(request.hardware.host_free_bytes)
        message = f"Beside the card, answering needs more host memory than the {free} that are free."
    nearest = [f"--context {shorter}"] if shorter else []
    nearest += ["--batch 1"] if step.batch > 1 and request.fits(_with(step, batch=1)) else []
    nearest += [f"--precision {leaner}" for leaner in _leaner(request, step)]
    if request.hardware.backend != "cpu":
        size = card_for(needed, request.hardware, profile_for(request.hardware))
        nearest.append(f"a {size} GB card")
    told = (
        f"What fits: {', or '.join(nearest)}."
        if nearest
        else "Close other programs, or take a smaller model."
    )
    return DoesNotFitError(message, told)


def _leaner(request: InferenceRequest, step: InferenceStep) -> list[BasePrecision]:
    """The first precision of fewer bits with which all else that was asked for fits."""
    own = step.base_precision
    fewer = _LEANER[_LEANER.index(own) + 1 :] if own in _LEANER else _LEANER
    dtype = compute_dtype("nf4", request.hardware)
    some = (_with(step, base_precision=one, compute_dtype=dtype) for one in fewer)
    return [one.base_precision for one in some if request.fits(one)][:1]
