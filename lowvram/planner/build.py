"""Builds the Plan: policy and wishes and data and hardware in, one frozen Plan (or a refusal) out."""

from __future__ import annotations

import math
import platform
from typing import Any

from lowvram.data.stats import DataStats
from lowvram.engine.config import BasePrecision, ComputeDtype, Levers, StepConfig
from lowvram.engine.shape import ModelShape
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, DoesNotFitError
from lowvram.hardware import DEFAULT_HELD_BYTES, Hardware
from lowvram.hardware import card_of_size as hardware_of_size
from lowvram.memory.cache import RememberedModel
from lowvram.memory.trace import Backend
from lowvram.planner.ladder import host_bytes, split
from lowvram.planner.optional import picks_liger, require_liger_on
from lowvram.planner.plan import Plan, PlannedDevice
from lowvram.planner.profiles import Profile, budget
from lowvram.planner.reasons import explain
from lowvram.planner.search import Found, Say, Search
from lowvram.planner.survey import Survey, survey
from lowvram.planner.wishes import Wishes
from lowvram.units import GiB, format_bytes, format_count

_MOST_LOST = 0.5  # of the examples may be left out for their length


def make_plan(
    source: ModelSource,
    hardware: Hardware,
    profile: Profile,
    wishes: Wishes,
    stats: DataStats | None = None,
    say: Say = lambda _: None,
) -> Plan:
    """Decide everything.

    Args:
        source: only its config and tokenizer are read, no weights.
        stats: what the data needs; None plans for the profile's default length.
        say: hears what is being traced.

    Raises:
        ConfigError: a wish that contradicts the model or the data.
        DoesNotFitError: nothing fits; the remedy is the nearest plan that does.
    """
    return _decide(source, hardware, profile, wishes, stats, say)[0]


def make_plan_and_survey(
    source: ModelSource,
    hardware: Hardware,
    profile: Profile,
    wishes: Wishes,
    stats: DataStats | None = None,
    say: Say = lambda _: None,
) -> tuple[Plan, Survey]:
    """The plan, and what would fit on other cards, at other lengths and ranks and by other methods."""
    plan, search = _decide(source, hardware, profile, wishes, stats, say)
    return plan, survey(plan, hardware, search)


def _decide(
    source: ModelSource,
    hardware: Hardware,
    profile: Profile,
    wishes: Wishes,
    stats: DataStats | None,
    say: Say,
) -> tuple[Plan, Search]:
    model = RememberedModel(source)
    if wishes.pinned_levers().get("liger"):
        require_liger_on(hardware.backend, source.config)
    base = _base_step(source, model.shape, hardware, profile, wishes, stats)
    mean_tokens = stats.mean_tokens if stats else base.seq_len
    search = Search(model, hardware, budget(hardware, profile), mean_tokens, say)
    found = _find(search, base, wishes, profile)
    return _assemble(source, hardware, profile, wishes, stats, search, found), search


def checked(plan: Plan, source: ModelSource) -> Plan:
    """A plan that a person may have edited, with its memory predicted anew.

    Raises:
        ConfigError: it contradicts the model or the device.
        DoesNotFitError: it needs more than its budget.
    """
    model = RememberedModel(source)
    model.shape.resolve_targets(plan.target_modules)
    if plan.seq_len > model.shape.context_limit:
        raise ConfigError(
            f"seq_len {plan.seq_len} is beyond the model's {model.shape.context_limit} positions.",
            "Edit the plan.",
        )
    if plan.compute_dtype == "fp16" and plan.device.backend == "cpu":
        raise ConfigError("compute_dtype fp16 is for GPUs: its loss scaling needs one.", "Use bf16 or fp32.")
    if plan.levers.liger:
        require_liger_on(plan.device.backend, source.config)
    backend: Backend = "cpu" if plan.device.backend == "cpu" else "cuda"
    predicted = model.estimate(plan.step, backend, plan.device.capability)
    if predicted.peak_reserved_bytes > plan.budget_bytes:
        raise DoesNotFitError(
            f"The plan needs {format_bytes(predicted.peak_reserved_bytes)}, "
            f"its budget is {format_bytes(plan.budget_bytes)}.",
            "Lower seq_len or micro_batch in the plan, or make a new one: lowvram plan ... -o FILE",
        )
    return plan.model_copy(update={"estimate": predicted})


def _base_step(
    source: ModelSource,
    shape: ModelShape,
    hardware: Hardware,
    profile: Profile,
    wishes: Wishes,
    stats: DataStats | None,
) -> StepConfig:
    precision: BasePrecision = wishes.precision or "nf4"
    targets = shape.resolve_targets(wishes.targets or profile.targets)
    _require_rank_within(shape, targets, wishes.rank or profile.rank)
    linux_gpu = hardware.backend in ("cuda", "rocm") and platform.system() == "Linux"
    return StepConfig(
        task_type=shape.task_type,
        target_len=_target_len(shape, profile),
        base_precision=precision,
        compute_dtype=_compute_dtype(hardware, precision),
        rank=wishes.rank or profile.rank,
        alpha=wishes.alpha or profile.alpha,
        dropout=profile.dropout if wishes.dropout is None else wishes.dropout,
        use_rslora=profile.use_rslora,
        target_modules=targets,
        seq_len=_seq_len(shape, profile, wishes, stats),
        micro_batch=1,
        accumulation=_effective_batch(profile, wishes, stats),
        levers=Levers(expandable_segments=linux_gpu, liger=picks_liger(source, hardware)),
    )


def _require_rank_within(shape: ModelShape, targets: tuple[str, ...], rank: int) -> None:
    """An adapter of a rank above its layer's own adds parameters and no freedom."""
    full = shape.full_rank(targets)
    if rank > full:
        raise ConfigError(
            f"--rank {rank} is above the full rank {full} of the largest target layer.",
            f"Use a rank up to {full}; 4 to 64 are usual.",
        )


def _compute_dtype(hardware: Hardware, precision: BasePrecision) -> ComputeDtype:
    if precision == "fp16" and hardware.backend == "cpu":
        raise ConfigError("--precision fp16 needs a GPU: its loss scaling does.", "Use nf4, bf16 or fp32.")
    if precision != "nf4" and precision != "int8":
        return precision
    if hardware.bf16:
        return "bf16"
    return "fp32" if hardware.backend in ("cpu", "mps") else "fp16"


def _seq_len(shape: ModelShape, profile: Profile, wishes: Wishes, stats: DataStats | None) -> int:
    limit = shape.context_limit
    if wishes.seq_len is not None and wishes.seq_len > limit:
        raise ConfigError(
            f"--seq-len {wishes.seq_len} is beyond the model's {limit} positions.",
            f"Use --seq-len {limit} or less.",
        )
    wanted = wishes.seq_len or (stats.longest_tokens if stats else profile.default_seq_len)
    _require_answers(min(wanted, limit), stats)
    return min(max(math.ceil(wanted / 8) * 8, 8), limit)


def _target_len(shape: ModelShape, profile: Profile) -> int | None:
    """T5-type models read the longest example and write a quarter of it: T5's own 512 and 114 tokens."""
    if shape.task_type == "CAUSAL_LM":
        return None
    return max(profile.default_seq_len // 4, 8)


def _require_answers(seq_len: int, stats: DataStats | None) -> None:
    """Refuse a length that leaves most examples without a token to learn from."""
    lost = stats.n_lost_at(seq_len) if stats else 0
    if stats and lost > _MOST_LOST * stats.n_examples:
        enough = stats.answer_start_quantiles[95] + 1
        raise ConfigError(
            f"In about {lost} of {stats.n_examples} examples the answer begins after {seq_len} tokens: "
            "they would teach nothing.",
            f"Use --seq-len {enough} or more (the longest example has {stats.longest_tokens} tokens).",
        )


def _effective_batch(profile: Profile, wishes: Wishes, stats: DataStats | None) -> int:
    if wishes.batch:
        return wishes.batch
    batch = profile.effective_batch
    while stats and batch > 1 and stats.n_examples < 8 * batch:  # at least 8 updates an epoch
        batch //= 2
    return batch


def _find(search: Search, base: StepConfig, wishes: Wishes, profile: Profile) -> Found:
    pinned = wishes.pinned_levers()
    seq_len = base.seq_len
    while True:
        found = search.fastest(base.model_copy(update={"seq_len": seq_len}), pinned, wishes.optimizer)
        if found is not None:
            return found
        if wishes.seq_len is not None or seq_len <= profile.smallest_seq_len:
            break
        seq_len = max(seq_len // 2 // 8 * 8, profile.smallest_seq_len)
    raise _refusal(search, base.model_copy(update={"seq_len": seq_len}), profile, pinned, wishes.optimizer)


def _refusal(
    search: Search, base: StepConfig, profile: Profile, pinned: dict[str, Any], optimizer: str | None
) -> DoesNotFitError:
    smallest = split(search.rungs(base, pinned, optimizer)[-1], 1)
    needed = search.reserved_bytes(smallest)
    message = (
        f"{smallest.seq_len} tokens at rank {smallest.rank} need {format_bytes(needed)}, "
        f"the budget is {format_bytes(search.budget_bytes)} of {search.hardware.name}."
    )
    seq_len = search.largest_seq_len(smallest, smallest.seq_len)
    if seq_len:
        return DoesNotFitError(message, f"The nearest plan that fits: --seq-len {seq_len}")
    size = _card_for(needed, search.hardware, profile)
    return DoesNotFitError(
        message,
        f"The nearest plan that fits is on a {size} GB card (--vram {size}GB), or take a smaller model.",
    )


def _card_for(needed_bytes: int, hardware: Hardware, profile: Profile) -> int:
    """The smallest card, in whole GiB, whose budget holds `needed_bytes`."""
    card = hardware_of_size(hardware.total_bytes, hardware)
    taken = needed_bytes + card.context_bytes + max(card.held_bytes, DEFAULT_HELD_BYTES)
    return math.ceil(taken / (1 - profile.margin_share) / GiB)


def _origin_note(source: ModelSource) -> list[str]:
    if source.config_origin != "shipped table":
        return []
    return [f"config from the shipped table ({source.refusal and source.refusal.reason})"]


def _unquantized_note(shape: ModelShape, step: StepConfig) -> list[str]:
    """A mixture's experts are no linear layers in transformers 5: bitsandbytes leaves them in 16 bits."""
    if step.base_precision != "nf4" or not shape.stacked_parameters:
        return []
    experts = format_count(shape.stacked_parameters)
    return [
        f"{experts} parameters are a mixture's experts, not linear layers: they stay in 16 bits and are not "
        "adapted"
    ]


def _untiled_note(shape: ModelShape, step: StepConfig) -> list[str]:
    if not shape.untiled or not step.levers.gradient_checkpointing:
        return []
    return [f"tile_tokens and offload_checkpoints: not for this model, {shape.untiled}"]


def _total_steps(
    profile: Profile, wishes: Wishes, stats: DataStats | None, effective_batch: int, seq_len: int
) -> int:
    if wishes.steps:
        return wishes.steps
    if stats is None:
        return 1
    per_epoch = math.ceil((stats.n_examples - stats.n_lost_at(seq_len)) / effective_batch)
    return max(1, math.ceil(per_epoch * (wishes.epochs or profile.epochs)))


def _assemble(
    source: ModelSource,
    hardware: Hardware,
    profile: Profile,
    wishes: Wishes,
    stats: DataStats | None,
    search: Search,
    found: Found,
) -> Plan:
    step, shape = found.step, search.model.shape
    steps = _total_steps(profile, wishes, stats, step.micro_batch * step.accumulation, step.seq_len)
    largest = max(search.largest_seq_len(step, shape.context_limit), step.seq_len)
    on_cpu = hardware.backend == "cpu"
    return Plan(
        **{name: getattr(step, name) for name in StepConfig.model_fields},
        model=source.name,
        trust_remote_code=source.trust_remote_code,
        data=stats.source if stats else None,
        data_sha256=stats.sha256 if stats else None,
        profile=profile.name,
        learning_rate=wishes.learning_rate or profile.learning_rate,
        schedule=profile.schedule,
        warmup_steps=round(profile.warmup_share * steps),
        total_steps=steps,
        evaluate_every=max(1, steps // 5),
        save_every=max(1, min(steps // 5, 50)),
        seed=wishes.seed,
        device=PlannedDevice(**{n: getattr(hardware, n) for n in PlannedDevice.model_fields}),
        budget_bytes=search.budget_bytes,
        estimate=found.estimate,
        largest_seq_len=largest,
        host_ram_bytes=host_bytes(step, shape) + (found.estimate.peak_allocated_bytes if on_cpu else 0),
        seconds_per_step=round(search.seconds(step), 3),
        n_parameters=shape.n_parameters,
        n_trainable=shape.n_trainable(step.target_modules, step.rank),
        reasons=(
            *_origin_note(source),
            *explain(step, hardware, profile, wishes, stats),
            *_unquantized_note(shape, step),
            *_untiled_note(shape, step),
        ),
    )
