"""Schedule: learning rate, warm-up and how many steps, from the profile's rule and the data."""

from __future__ import annotations

import math

from lowvram.data.order import steps_per_epoch
from lowvram.data.stats import DataStats
from lowvram.frozen import Frozen
from lowvram.planner.initialisation import RATE_FACTORS
from lowvram.planner.profiles import Profile
from lowvram.planner.wishes import Wishes

_MOST_SCALED = 4.0  # the learning rate's rule is not trusted further from the profile's batch
_LONGEST_WARMUP = 0.2  # of all steps
_EVALUATIONS = 5  # held-out losses in a run, beside the first
_EVALUATIONS_TO_STOP = 2  # times as many as an early stop waits for: half a run may be saved
_MOST_STEPS_LOST = 50  # between two checkpoints
_CHECKPOINTS_KEPT = 2  # one to go on from, and one should it be damaged


class Schedule(Frozen):
    """What the steps of a run are."""

    learning_rate: float
    warmup_steps: int
    total_steps: int
    evaluate_every: int
    save_every: int
    keep_checkpoints: int
    early_stop: int


def schedule_for(
    profile: Profile, wishes: Wishes, stats: DataStats | None, effective_batch: int, seq_len: int
) -> Schedule:
    """The whole run's."""
    factor = batch_factor(profile, effective_batch)
    rate = profile.learning_rate * factor * RATE_FACTORS.get(wishes.init or "default", 1.0)
    steps = _total_steps(profile, wishes, stats, effective_batch, seq_len)
    return Schedule(
        learning_rate=wishes.learning_rate or float(f"{rate:.2g}"),
        warmup_steps=_warmup_steps(profile, factor, steps),
        total_steps=steps,
        evaluate_every=max(1, steps // max(_EVALUATIONS, _EVALUATIONS_TO_STOP * (wishes.early_stop or 0))),
        save_every=max(1, min(steps // _EVALUATIONS, _MOST_STEPS_LOST)),
        keep_checkpoints=wishes.keep_checkpoints or _CHECKPOINTS_KEPT,
        early_stop=wishes.early_stop or 0,
    )


def batch_factor(profile: Profile, effective_batch: int) -> float:
    """What the profile's learning rate is multiplied with: sqrt(batch ratio), Adam's rule (arXiv 2205.10287).

    The rank changes nothing: alpha/r keeps the best learning rate where it was (thinkingmachines.ai, "LoRA
    Without Regret", 2025), and above the profile's rank rsLoRA starts from the same scaling.
    """
    factor = math.sqrt(effective_batch / profile.effective_batch)
    return min(max(factor, 1 / _MOST_SCALED), _MOST_SCALED)


def _warmup_steps(profile: Profile, factor: float, steps: int) -> int:
    """A larger learning rate warms up for longer; the warm-up ends before the run."""
    share = min(profile.warmup_share * max(factor, 1.0), max(_LONGEST_WARMUP, profile.warmup_share))
    return min(round(share * steps), steps - 1)


def _total_steps(
    profile: Profile, wishes: Wishes, stats: DataStats | None, effective_batch: int, seq_len: int
) -> int:
    if wishes.steps:
        return wishes.steps
    if stats is None:
        return 1
    per_epoch = steps_per_epoch(stats.n_examples - stats.n_lost_at(seq_len), effective_batch)
    return max(1, math.ceil(per_epoch * (wishes.epochs or profile.epochs)))
