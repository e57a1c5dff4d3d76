"""The step before a lever is moved: adapter, length and batch, from wishes, data and profile."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass

from lowvram.data.stats import DataStats
from lowvram.device_rates import DeviceRates
from lowvram.engine.config import BasePrecision, Levers, StepConfig
from lowvram.engine.shape import ModelShape
from lowvram.engine.source import ModelSource
from lowvram.hardware import Hardware
from lowvram.planner.initialisation import PAPERS_ALPHA, scales_as_in_paper
from lowvram.planner.levers import compute_dtype, sixteen_bit
from lowvram.planner.optional import picks_liger
from lowvram.planner.profiles import Profile
from lowvram.planner.wishes import Wishes


@dataclass(frozen=True)
class Request:
    """Everything that a plan is made from."""

    source: ModelSource
    hardware: Hardware
    profile: Profile
    wishes: Wishes
    stats: DataStats | None = None  # of the data; None plans for the profile's length
    rates: DeviceRates | None = None  # of the device; None takes the table's


def first_step(request: Request, shape: ModelShape) -> StepConfig:
    """With every lever at rest."""
    profile, wishes, hardware = request.profile, request.wishes, request.hardware
    own: BasePrecision = "nf4" if wishes.init == "loftq" else sixteen_bit(hardware)
    precision = wishes.precision or own
    linux_gpu = hardware.backend in ("cuda", "rocm") and platform.system() == "Linux"
    liger = "liger" in profile.ladder and picks_liger(request.source, hardware)
    step = StepConfig(
        task_type=shape.task_type,
        target_len=_target_len(shape, profile, request.stats),
        base_precision=precision,
        compute_dtype=compute_dtype(precision, hardware),
        dropout=profile.dropout if wishes.dropout is None else wishes.dropout,
        target_modules=shape.resolve_targets(wishes.targets or profile.targets),
        seq_len=_seq_len(request, shape),
        bias=wishes.bias or "none",
        init=wishes.init or "default",
        init_batches=wishes.init_batches or StepConfig.model_fields["init_batches"].default,
        use_dora=bool(wishes.dora),
        lora_plus_ratio=wishes.lora_plus or 1.0,
        freeze_a=bool(wishes.lora_fa),
        inference_mode=wishes.inference_mode,
        micro_batch=1,
        accumulation=effective_batch(profile, wishes, request.stats),
        levers=Levers(expandable_segments=linux_gpu, liger=liger),
    )
    return with_adapter(step, wishes.rank or profile.rank, profile, wishes)


def with_adapter(step: StepConfig, rank: int, profile: Profile, wishes: Wishes) -> StepConfig:
    """The step with LoRA of a rank, scaled by the profile's rule.

    Up to the profile's rank the update is scaled by alpha/r, as in its reference. Above it alpha/r would
    shrink it; rsLoRA's alpha/sqrt(r) (arXiv 2312.03732) goes on from the same scaling at the profile's rank,
    so that its learning rate holds. Asked for, it is peft's: the same alpha over sqrt(r), a stronger update.
    LoRA-GA and LoRA-One are scaled as in their papers.
    """
    if scales_as_in_paper(wishes):
        papers = {"rank": rank, "use_rslora": True, "alpha": wishes.alpha or PAPERS_ALPHA}
        return step.model_copy(update=papers)
    above = rank > profile.rank and wishes.alpha is None
    by_rule = {"never": False, "always": True, "above_rank": above}[profile.use_rslora]
    use_rslora = by_rule if wishes.rslora is None else wishes.rslora
    alpha = profile.alpha
    if use_rslora and wishes.rslora is None and profile.use_rslora == "above_rank":
        alpha = round(profile.alpha / math.sqrt(profile.rank), 2)
    changes = {"rank": rank, "use_rslora": use_rslora, "alpha": wishes.alpha or alpha}
    return step.model_copy(update=changes)


def _target_len(shape: ModelShape, profile: Profile, stats: DataStats | None) -> int | None:
    """The longest target; without data a quarter of the source: T5's own 512 and 114 tokens."""
    if shape.task_type == "CAUSAL_LM":
        return None
    if stats is None or stats.target_quantiles is None:
        return max(profile.default_seq_len // 4, 8)
    return math.ceil(stats.target_quantiles[100] / 8) * 8


def _seq_len(request: Request, shape: ModelShape) -> int:
    """The longest example's, so that none is cut; in steps of 8 tokens."""
    stats, limit = request.stats, shape.context_limit
    wanted = request.wishes.seq_len or (stats.longest_tokens if stats else request.profile.default_seq_len)
    return min(max(math.ceil(wanted / 8) * 8, 8), limit)


def effective_batch(profile: Profile, wishes: Wishes, stats: DataStats | None) -> int:
    """Examples in one optimizer step: at least 8 steps an epoch."""
    if wishes.batch:
        return wishes.batch
    batch = profile.effective_batch
    while stats and batch > 1 and stats.n_examples < 8 * batch:
        batch //= 2
    return max(batch, wishes.micro_batch or 1)
