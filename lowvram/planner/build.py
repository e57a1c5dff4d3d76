"""Builds the Plan: policy and wishes and data and hardware in, one frozen Plan (or a refusal) out."""

from __future__ import annotations

from functools import cache

from lowvram.data.shapes import Reading
from lowvram.data.stats import DataStats
from lowvram.device_rates import DeviceRates, rates_of
from lowvram.engine.config import StepConfig
from lowvram.engine.shape import ModelShape
from lowvram.engine.source import ModelSource
from lowvram.hardware import Hardware
from lowvram.memory.cache import RememberedModel
from lowvram.planner.choice import choose
from lowvram.planner.conflicts import refuse_conflicts
from lowvram.planner.figures import figures
from lowvram.planner.first_step import Request, first_step
from lowvram.planner.plan import Plan, PlannedDevice
from lowvram.planner.profiles import Profile, budget
from lowvram.planner.reasons import explain
from lowvram.planner.schedule import schedule_for
from lowvram.planner.search import Freedom, Say, Search
from lowvram.planner.time_model import TimeModel
from lowvram.planner.wishes import Wishes
from lowvram.planner.workload import Workload, workload

_ROOM_TO_PACK = 0.8  # an average example of that share of the longest leaves little to put beside it


def make_plan(
    source: ModelSource,
    hardware: Hardware,
    profile: Profile,
    wishes: Wishes,
    stats: DataStats | None = None,
    say: Say = lambda _: None,
    rates: DeviceRates | None = None,
) -> Plan:
    """Decide everything.

    Args:
        source: only its config and tokenizer are read, no weights.
        stats: what the data needs; None plans for the profile's default length.
        say: hears what is being traced.
        rates: how fast the device is, where that was measured; None takes the table's.

    Raises:
        ConfigError: wishes that contradict each other, the model or the data, all together.
        DoesNotFitError: nothing fits; the remedy is the nearest plans that do.
    """
    return decide(Request(source, hardware, profile, wishes, stats, rates), say)[0]


def decide(request: Request, say: Say = lambda _: None) -> tuple[Plan, Search]:
    """The plan, and the search that found it, which knows its neighbours.

    Raises:
        ConfigError, DoesNotFitError: as `make_plan`.
    """
    model = RememberedModel(request.source)
    refuse_conflicts(request, model.shape)
    search = search_for(request, model, say)
    base = first_step(request, model.shape)
    step = choose(search, base, request)
    return _plan(request, search, step), search


def search_for(request: Request, model: RememberedModel, say: Say = lambda _: None) -> Search:
    """A search with what this request leaves to decide."""
    profile, wishes = request.profile, request.wishes
    packs, quantized = _packs(request, model.shape), profile.quantized_head != "never"
    freedom = Freedom(wishes.pinned, profile.ladder, not wishes.no_offload, packs, quantized)
    room = budget(request.hardware, profile)
    rates = request.rates or rates_of(request.hardware)
    return search_on(request.hardware, rates, model, room, request.stats, freedom, say)


def search_on(
    hardware: Hardware,
    rates: DeviceRates,
    model: RememberedModel,
    budget_bytes: int,
    stats: DataStats | None,
    freedom: Freedom = Freedom(),  # noqa: B008  # frozen
    say: Say = lambda _: None,
) -> Search:
    """A model on a device; without freedom it only judges steps."""
    time = TimeModel(model.shape, rates, hardware.backend == "cpu")

    @cache
    def work(seq_len: int, effective_batch: int) -> Workload:
        return workload(stats, seq_len, effective_batch)

    return Search(model, hardware, budget_bytes, time, work, freedom, say)


def _packs(request: Request, shape: ModelShape) -> bool:
    """Whether examples are packed where they may be."""
    wished, stats = request.wishes.packing, request.stats
    if wished is not None:
        return wished
    if stats is None or shape.unpacked or "packing" not in request.profile.ladder:
        return False
    if request.hardware.backend == "cpu":  # which has no launches to save: packed rows ran at 0.95 the speed
        return False
    return stats.mean_tokens <= _ROOM_TO_PACK * stats.longest_tokens


def _plan(request: Request, search: Search, step: StepConfig) -> Plan:
    profile, wishes, stats = request.profile, request.wishes, request.stats
    schedule = schedule_for(profile, wishes, stats, step.effective_batch, step.seq_len)
    device = {name: getattr(request.hardware, name) for name in PlannedDevice.model_fields}
    return Plan(
        **{name: getattr(step, name) for name in StepConfig.model_fields},
        **schedule.model_dump(),
        **figures(search, step, schedule, stats),
        model=request.source.name,
        trust_remote_code=request.source.trust_remote_code,
        data=stats.source if stats else None,
        data_sha256=stats.sha256 if stats else None,
        reading=stats.reading if stats else Reading(),
        eval_data=stats.eval_source if stats else None,
        eval_data_sha256=stats.eval_sha256 if stats else None,
        profile=profile.name,
        schedule=profile.schedule,
        seed=wishes.seed,
        device=PlannedDevice(**device),
        budget_bytes=search.budget_bytes,
        reasons=explain(request, search, step),
    )
