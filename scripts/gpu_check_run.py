"""One stage of gpu_check in a process of its own, so that a crash costs one stage: arguments in, rows out."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_check_answers import answer_rows
from gpu_check_levers import parity_checks
from gpu_check_micro import micro_checks
from gpu_check_model import config_of
from gpu_check_recovery import recovery_checks
from gpu_check_rows import Row
from gpu_check_step import (
    ALL_LINEAR,
    LONG_STEP,
    Trial,
    attempt,
    measured_rows,
    self_checks,
    shape_of,
    tiled_rows,
)

from lowvram import hardware as machine
from lowvram.device_rates import known_rates
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.source import ModelSource
from lowvram.errors import DoesNotFitError
from lowvram.frozen import Frozen, write_atomically
from lowvram.hardware import Hardware, card_of_size
from lowvram.memory.cache import RememberedModel
from lowvram.memory.estimate import MemoryEstimate, estimate
from lowvram.memory.snapshot import replay_snapshot
from lowvram.planner.build import make_plan
from lowvram.planner.plan import Plan
from lowvram.planner.profiles import profile_for
from lowvram.planner.receipts import Experience, with_experience
from lowvram.planner.variants import with_length
from lowvram.planner.wishes import Wishes
from lowvram.training.monitor import MemoryMonitor
from lowvram.units import GiB, format_bytes

Emit = Callable[[Row], None]
_STEPS = 3  # the first makes the optimizer's state and loads kernels; the others are timed
_BEYOND = 1.05
STAGES = ("small", "micro", "levers", "recovery", "tiles", "answers", "plan", "card", "self-check")


class Job(Frozen):
    """A plan for an emulated card, with the prediction for its longest context."""

    card_gib: float
    model: str
    plan: Plan
    at_largest: MemoryEstimate
    model_limit: int

    def row(self, check: str, seq_len: int | None = None) -> Row:
        """A row about this job, still without measurements."""
        shape = shape_of(self.plan)
        shape["seq_len"] = seq_len or self.plan.seq_len
        budget = self.plan.budget_bytes
        return Row(check=check, card_gib=self.card_gib, model=self.model, budget_bytes=budget, **shape)


def emulated(card_gib: float, here: Hardware) -> Hardware:
    """A card of this size with this GPU's context and without a desktop."""
    card = card_of_size(int(card_gib * GiB), here)
    return card.model_copy(update={"held_bytes": 0, "free_bytes": card.total_bytes})


def plan_job(model: str, card_gib: float, here: Hardware) -> Job:
    """The planner's own plan, over the base that the weights made here have.

    Raises:
        DoesNotFitError: the planner refuses.
    """
    card, config = emulated(card_gib, here), config_of(model)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        source = ModelSource(folder)
        plan = make_plan(source, card, profile_for(card), Wishes(precision="nf4"), rates=known_rates(here))
        longest = with_length(plan, plan.largest_seq_len)
        at_largest = estimate(source.config, longest, "cuda", card.capability)
        limit = RememberedModel(source).shape.context_limit
    return Job(card_gib=card_gib, model=model, plan=plan, at_largest=at_largest, model_limit=limit)


def run_job(job: Job, emit: Emit, device: str = "cuda") -> None:
    """The plan's step, its evaluation, its longest context, and one beyond that, on the emulated card."""
    monitor = MemoryMonitor(device)
    monitor.start()
    try:
        _run_watched(job, monitor, emit, device)
    finally:
        monitor.stop()


def _run_watched(job: Job, monitor: MemoryMonitor, emit: Emit, device: str) -> None:
    plan = job.plan
    if device == "cuda" and not emulate(plan.device.total_bytes, plan.device.context_bytes):
        emit(job.row("plan").model_copy(update={"outcome": "not run: this GPU is smaller"}))
        return
    trials: list[Trial] = []
    outcome = attempt(lambda: trials.append(Trial(config_of(job.model), plan, device, monitor)))
    if outcome != "ran":
        _emit_measured(job.row("plan"), outcome, plan.estimate, job, monitor, emit)
        return
    _run_plan(job, trials[0], emit)
    _run_longest(job, trials[0], emit)
    _run_beyond(job, trials[0], emit)


def emulate(card_bytes: int, context_bytes: int) -> bool:
    """Let the allocator take what a card of this size leaves beside the context; False on a smaller GPU."""
    _, total = torch.cuda.mem_get_info(0)
    share = (card_bytes - context_bytes) / total
    if share > 1:
        return False
    torch.cuda.set_per_process_memory_fraction(share)
    return True


def _run_plan(job: Job, trial: Trial, emit: Emit) -> None:
    plan, seconds = job.plan, [float("inf")]

    def run() -> None:
        trial.evaluate(plan)  # first, as training does
        seconds[:] = [trial.step(plan) for _ in range(_STEPS)][1:]

    outcome = attempt(run)
    tokens = plan.micro_batch * plan.seq_len * min(plan.accumulation, 2)
    speed = round(tokens / statistics.mean(seconds), 1) or None
    modelled = plan.effective_batch * plan.seq_len / max(plan.seconds_per_step, 1e-3)
    told = {"tokens_per_second": speed, "modelled_tokens_per_second": round(modelled, 1)}
    base = job.row("plan").model_copy(update=told)
    _emit_measured(base, outcome, plan.estimate, job, trial.monitor, emit)


def _run_longest(job: Job, trial: Trial, emit: Emit) -> None:
    longest = with_length(job.plan, job.plan.largest_seq_len)

    def run() -> None:
        trial.evaluate(longest)
        trial.last_of(longest)

    outcome = _alone(trial, run)
    _emit_measured(job.row("largest", longest.seq_len), outcome, job.at_largest, job, trial.monitor, emit)


def _run_beyond(job: Job, trial: Trial, emit: Emit) -> None:
    """5 % more tokens than the plan's longest context: running means that the planner leaves that much."""
    beyond = int(job.plan.largest_seq_len * _BEYOND)
    row = job.row("beyond", beyond)
    if beyond > job.model_limit:
        emit(row.model_copy(update={"outcome": f"not run: the model knows {job.model_limit} positions"}))
        return
    step = with_length(job.plan, beyond)
    outcome = _alone(trial, lambda: trial.last_of(step))
    _emit_measured(row, outcome, None, job, trial.monitor, emit)


def _alone(trial: Trial, run: Callable[[], object]) -> str:
    """As in a process that never ran anything shorter."""
    trial.clear()
    trial.monitor.forget()
    return attempt(run)


def _emit_measured(
    base: Row, outcome: str, predicted: MemoryEstimate | None, job: Job, monitor: MemoryMonitor, emit: Emit
) -> None:
    context = monitor.context_bytes
    note = f"context {format_bytes(context)} at its largest" if context else None
    base = base.model_copy(update={"outcome": outcome, "note": note})
    for row in measured_rows(base, predicted, monitor, job.plan.device.context_bytes):
        emit(row)


def small_step(emit: Emit, keep: Path) -> Hardware:
    """A small model's step: the allocator's record replayed, and the context that a step leaves.

    Args:
        keep: where the record is kept, as JSON.

    Returns:
        This machine, with that context.
    """
    monitor = MemoryMonitor("cuda")
    monitor.start()
    torch.cuda.memory._record_memory_history(context=None)
    bf16, config = torch.cuda.is_bf16_supported(including_emulation=False), config_of("tiny")
    step = StepConfig(
        compute_dtype="bf16" if bf16 else "fp16",
        target_modules=ALL_LINEAR,
        seq_len=1024,
        micro_batch=2,
        levers=Levers(expandable_segments=True),
    )
    trial = Trial(config, step, "cuda", monitor)
    for _ in range(2):
        trial.step(step)
    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    capability = torch.cuda.get_device_capability(0)
    base = Row(check="snapshot", model="tiny", **shape_of(step))
    for row in measured_rows(base, estimate(config, step, "cuda", capability), monitor, 0):
        emit(row)
    emit(_replayed(snapshot))
    write_atomically(keep, json.dumps(_without_frames(snapshot)))
    context = monitor.context_bytes
    monitor.stop()
    emit(Row(check="context", assumed_bytes=machine.DEFAULT_CONTEXT_BYTES, measured_bytes=context))
    return with_experience(machine.probe(), Experience(context_bytes=context))


def _replayed(snapshot: dict[str, Any]) -> Row:
    """Our allocator's rules on what CUDA's really allocated: its own reserved bytes should come out."""
    found = replay_snapshot(snapshot)
    return Row(
        check="replay",
        assumed_bytes=found.replayed_peak_reserved_bytes,
        measured_bytes=found.recorded_peak_reserved_bytes,
        measured_allocated_bytes=found.recorded_peak_allocated_bytes,
        note=str(found)[:300],
    )


def _without_frames(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without_frames(v) for k, v in value.items() if k != "frames"}
    if isinstance(value, (list, tuple)):
        return [_without_frames(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def main() -> None:
    """`gpu_check_run.py STAGE --rows FILE ...`: each row is added to FILE as one line of JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--hardware", type=Path, help="written by small, read by plan")
    parser.add_argument("--job", type=Path, help="written by plan, read by card")
    parser.add_argument("--model")
    parser.add_argument("--card", type=float)
    given = parser.parse_args()

    def emit(row: Row) -> None:
        with given.rows.open("a", encoding="utf-8") as handle:
            handle.write(row.model_dump_json() + "\n")

    if given.stage == "small":
        found = small_step(emit, given.rows.with_name("snapshot.json"))
        write_atomically(given.hardware, found.model_dump_json())
    elif given.stage == "micro":
        micro_checks(emit)
    elif given.stage == "levers":
        parity_checks(emit, "cuda")
    elif given.stage == "recovery":
        recovery_checks(emit, "cuda")
    elif given.stage == "tiles":
        tiled_rows(emit, "qwen2-7b/4", "cuda", LONG_STEP)
    elif given.stage == "answers":
        answer_rows(emit, "cuda")
    elif given.stage == "plan":
        here = Hardware.model_validate_json(given.hardware.read_bytes())
        try:
            write_atomically(given.job, plan_job(given.model, given.card, here).model_dump_json())
        except DoesNotFitError as error:
            refused = {"outcome": "refused", "note": f"{error.message} {error.remedy}"}
            emit(Row(check="refused", card_gib=given.card, model=given.model, **refused))
    elif given.stage == "card":
        run_job(Job.model_validate_json(given.job.read_bytes()), emit)
    else:
        self_checks(emit)
        parity_checks(emit, "cpu")
        recovery_checks(emit, "cpu")


if __name__ == "__main__":
    main()
