"""Planning: from a model, its data and a device to a plan; imports torch only for what is not known yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.data.shapes import Reading
from lowvram.data.work_force import progress_line
from lowvram.device_rates import known_rates
from lowvram.engine.source import ModelSource, absolute
from lowvram.hardware import Hardware
from lowvram.memory.cache import RememberedModel
from lowvram.planner.build import decide
from lowvram.planner.first_step import Request
from lowvram.planner.plan import Plan
from lowvram.planner.profiles import Profile
from lowvram.planner.receipts import experience_on, with_experience
from lowvram.planner.search import Say
from lowvram.planner.survey import Survey, survey
from lowvram.planner.why import LeverWhy, why
from lowvram.planner.wishes import Wishes
from lowvram.units import MiB

if TYPE_CHECKING:
    from lowvram.training.data import PreparedData

RUN_FILES_BYTES = 64 * MiB  # tokenizer copies, metrics, plan


@dataclass(frozen=True)
class Planned:
    """A plan with the data it was made for; `prepared` is None when no data was given."""

    source: ModelSource
    plan: Plan
    prepared: PreparedData | None
    survey: Survey | None = None
    why: tuple[LeverWhy, ...] | None = None


def plan_for(
    source: ModelSource,
    data: str | None,
    hardware: Hardware,
    profile: Profile,
    wishes: Wishes,
    say: Say,
    with_survey: bool = False,
    with_why: bool = False,
    reading: Reading = Reading(),  # noqa: B008  # frozen
    eval_data: str | None = None,
) -> Planned:
    """Read the config and the data, then plan. No weights are read.

    Args:
        eval_data: held-out examples of their own, read as the data is; None holds out a share of it.
        reading: how the data is read, where it does not speak for itself.
        with_survey: also what else would fit; with_why: also each lever beside its next setting.
    """
    _ = RememberedModel(source).shape  # a wrong model is refused before the data is read
    prepared = _prepared(data, reading, eval_data, source, say) if data is not None else None
    stats = prepared.stats if prepared else None
    experience = experience_on(hardware)
    device = with_experience(hardware, experience)
    request = Request(source, device, profile, wishes, stats, known_rates(device))
    plan, search = decide(request, say)
    around = survey(plan, device, search) if with_survey else None
    levers = why(search, plan.step, request) if with_why else None
    reasons = (*plan.reasons, *([experience.sentence] if experience.sentence else []))
    plan = anywhere(plan.model_copy(update={"reasons": reasons}), source)
    return Planned(source, plan, prepared, around, levers)


def _prepared(
    data: str, reading: Reading, eval_data: str | None, source: ModelSource, say: Say
) -> PreparedData:
    from lowvram.training.data import prepare

    say(f"reading {data}")
    return prepare(
        data,
        source,
        reading=reading,
        eval_name=eval_data,
        progress=lambda done, left: say(progress_line(data, done, left)),
    )


def anywhere(plan: Plan, source: ModelSource) -> Plan:
    """The plan with absolute names of a local model and data files, so that it runs from every directory."""
    names = {field: getattr(plan, field) for field in ("data", "eval_data")}
    # A file, or a folder of datasets; what is neither is on the hub.
    local = {field: absolute(name) for field, name in names.items() if name and Path(name).exists()}
    return plan.model_copy(update={"model": source.name, **local})


def needs_on_disk(planned: Planned) -> tuple[int | None, int]:
    """(bytes to download first, None when nobody says; bytes of the run folder)."""
    return planned.source.download_bytes(), run_bytes(planned.plan)


def run_bytes(plan: Plan) -> int:
    """Disk that a run takes: checkpoints (weights and two moments, float32), the adapter, small files.

    A frozen A is about as large as B, and has no moments. An adapter that subtracts its start keeps that in
    the compute dtype in each checkpoint, and is saved at twice its rank.
    """
    moments, start = 2 * 4 * plan.n_trainable, 0
    files = 4 * plan.n_trainable * (2 if plan.freeze_a else 1)
    if plan.subtracts_start:
        start = files if plan.compute_dtype == "fp32" else files // 2
    saved = 2 * files if start else files
    at_once = plan.keep_checkpoints + 2  # the newest, the best, and one that is being written
    return (moments + files + start) * at_once + saved + RUN_FILES_BYTES
