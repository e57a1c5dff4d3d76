"""Evaluations of a run: held-out loss and perplexity, which one is best so far, and when to stop for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lowvram.planner.plan import Plan
    from lowvram.training.data import PreparedData


@dataclass
class Evaluations:
    """What the held-out losses after steps of a run have shown; the untrained model's is none of them."""

    last_step: int = 0
    last_loss: float | None = None
    best_step: int = 0  # 0: none yet
    best_loss: float | None = None
    n_since_best: int = 0  # evaluations in a row without a better loss

    def add(self, step: int, loss: float) -> None:
        """A loss that is no number is never the best."""
        self.last_step, self.last_loss = step, loss
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_step, self.best_loss, self.n_since_best = step, loss, 0
        else:
            self.n_since_best += 1

    def forget_best(self, step: int) -> None:
        """Its checkpoint is gone: the best is the one of `step`, whose adapter is here, or else the next."""
        self.best_step, self.best_loss, self.n_since_best = 0, None, 0
        if self.last_step == step and self.last_loss is not None:
            self.add(step, self.last_loss)

    def ends_run(self, early_stop: int) -> bool:
        """Whether `early_stop` of them (0: however many) came in a row without a better one."""
        return 0 < early_stop <= self.n_since_best

    def as_json(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return dict(vars(self))


def perplexity(loss: float | None) -> float | None:
    """e to the mean loss of a token; None beyond the range of a float, from a loss of 710 on.

    >>> perplexity(0.0)
    1.0
    >>> perplexity(1000.0)
    """
    if loss is None or math.isnan(loss):
        return None
    try:
        value = math.exp(loss)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def evaluation_notes(plan: Plan, prepared: PreparedData) -> list[str]:
    """What is done to held-out examples that have a file of their own, said aloud."""
    if plan.eval_data is None:
        return []
    held_out, train = prepared.held_out, prepared.train
    n_lost = int((held_out.answer_starts >= plan.seq_len).sum())
    n_cut = int((held_out.lengths > plan.seq_len).sum()) - n_lost
    n_known = int(np.isin(held_out.store.digests, train.store.digests).sum())
    told = [
        (n_cut, f"are longer than {plan.seq_len} tokens and are cut there"),
        (n_lost, f"are left out: their answers begin after {plan.seq_len} tokens"),
        (n_known, "are among the training data too: their loss says nothing about new text"),
    ]
    return [f"{n} of {len(held_out)} held-out examples {what}" for n, what in told if n]
