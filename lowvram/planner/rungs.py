"""Rungs: a leaner step for a run that ran out of memory, and a leaner plan when no step is lean enough."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lowvram.device_rates import rates_of
from lowvram.engine.config import StepConfig
from lowvram.engine.source import ModelSource
from lowvram.hardware import Hardware
from lowvram.memory.cache import RememberedModel
from lowvram.memory.estimate import MemoryEstimate
from lowvram.planner.build import search_on
from lowvram.planner.figures import figures
from lowvram.planner.guess import Guess
from lowvram.planner.hunt import Hunt
from lowvram.planner.levers import LEVERS
from lowvram.planner.plan import Plan
from lowvram.planner.profiles import load_profile
from lowvram.planner.schedule import Schedule
from lowvram.planner.search import Freedom, Search
from lowvram.planner.space import ALL, Candidate
from lowvram.planner.variants import value_of, with_length

# What a running process can change: all else is in the weights' layout or in the optimizer's state.
MOVABLE = (
    "micro_batch",
    "gradient_checkpointing",
    "kept_layers",
    "loss_chunk_tokens",
    "tile_tokens",
    "offload_checkpoints",
)
_WHOLE = 1 << 62
_LESS = 0.9  # of what failed: with three rungs a third of the memory can be given up


@dataclass(frozen=True)
class LeanerStep:
    """The same examples, the same weighting, less memory."""

    step: StepConfig
    changes: dict[str, tuple[Any, Any]]  # setting -> before, after
    peak_reserved_bytes: int  # predicted


def next_rung(
    now: StepConfig, source: ModelSource, hardware: Hardware, room_bytes: int | None = None
) -> LeanerStep | None:
    """The fastest step that a running process can change to and that takes clearly less than `now`; or None.

    Every setting is as lean as before or leaner. Where nothing saves a tenth, it is the half of what can
    be saved at all.

    Args:
        now: the step that failed.
        room_bytes: what the device really gives; None where nothing counts it.
    """
    search = _search(source, hardware, _freedom(now))
    some = list(_leaner(search.candidates(now.model_copy(update={"packing": False})), now))
    if not some:
        return None

    def estimate(step: StepConfig) -> MemoryEstimate:
        return _running(search.estimate(step))

    failed_bytes = estimate(now).peak_reserved_bytes
    least_bytes = estimate(search.leanest_of(some)).peak_reserved_bytes
    wanted = min(int(_LESS * failed_bytes), room_bytes or failed_bytes)
    budget = wanted if wanted >= least_bytes else (failed_bytes + least_bytes) // 2
    step = Hunt(some, search.seconds, estimate, budget, Guess(search.model.shape)).fastest()
    if step is None or estimate(step).peak_reserved_bytes >= failed_bytes:
        return None
    return LeanerStep(step, changes_between(now, step), search.reserved_bytes(step))


def changes_between(before: StepConfig, after: StepConfig) -> dict[str, tuple[Any, Any]]:
    """Setting -> before, after; of levers and fields that differ."""
    names = (*MOVABLE, "packing")
    pairs = {name: (value_of(before, name), value_of(after, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def plan_that_fits(
    plan: Plan, source: ModelSource, hardware: Hardware, room_bytes: int | None
) -> Plan | None:
    """The plan with every lever free again, for what the device gives; as long as can be, at most as planned.

    Args:
        room_bytes: as `next_rung`; None takes an eighth less than was planned.
    """
    profile = load_profile(plan.profile)
    room = room_bytes or plan.estimate.peak_reserved_bytes * 7 // 8
    search = _search(source, hardware, Freedom({}, profile.ladder, True, plan.packing))
    search.budget_bytes = room
    step = search.fastest(plan.step)
    if step is None:
        seq_len = search.largest_seq_len(search.leanest(plan.step), plan.seq_len, keeps=True)
        step = search.fastest(with_length(plan.step, seq_len)) if seq_len else None
    if step is None:
        return None
    schedule = Schedule(**{name: getattr(plan, name) for name in Schedule.model_fields})
    fields = {name: getattr(step, name) for name in StepConfig.model_fields}
    told = (f"made after running out of memory: {room:,} bytes were there",)
    changed = fields | figures(search, step, schedule, None)
    return plan.model_copy(update={**changed, "budget_bytes": room, "reasons": told})


def _search(source: ModelSource, hardware: Hardware, freedom: Freedom) -> Search:
    return search_on(hardware, rates_of(hardware), RememberedModel(source), 0, None, freedom)


def _running(estimate: MemoryEstimate) -> MemoryEstimate:
    """Without loading, which is over: where that was the peak, no lever of a step would seem to help."""
    running = max((n for phase, n in estimate.phases_bytes.items() if phase != "load"), default=0)
    saved = estimate.peak_allocated_bytes - running
    return estimate.model_copy(update={"peak_reserved_bytes": estimate.peak_reserved_bytes - saved})


def _freedom(now: StepConfig) -> Freedom:
    names = [lever.name for lever in LEVERS if lever.name not in (*MOVABLE, "packing")]
    return Freedom({name: value_of(now, name) for name in names}, MOVABLE, True, now.packing)


def _leaner(some: list[Candidate], now: StepConfig) -> Iterator[Candidate]:
    """Those with no setting that takes more than now, and of each what it may keep of the layers."""
    for one in some:
        if all(a <= b for a, b in zip(_sizes(one.step), _sizes(now), strict=True)):
            kept = tuple(k for k in one.kept if _kept(k) <= _kept(_keeps(now)))
            if kept:
                yield replace(one, kept=kept)


def _sizes(step: StepConfig) -> tuple[int, ...]:
    """Each grows with the memory that a step takes."""
    levers = step.levers
    tile = levers.tile_tokens or _WHOLE
    return step.micro_batch, levers.loss_chunk_tokens, tile, -int(levers.offload_checkpoints)


def _keeps(step: StepConfig) -> Any:
    return step.levers.kept_layers if step.levers.gradient_checkpointing else ALL


def _kept(choice: Any) -> int:
    return _WHOLE if choice == ALL else int(choice)
