"""The evaluation that a run gave up in for want of memory, made when it is resumed."""

from __future__ import annotations

from lowvram.training.evaluation import perplexity
from lowvram.training.finite import require_finite_held_out
from lowvram.training.metrics import StepRecord
from lowvram.training.resuming import save
from lowvram.training.run import Run
from lowvram.training.stepping import evaluated, evaluation_is_due


def evaluate_missing(run: Run) -> None:
    """Evaluate the step that a resume begins after, where its record lacks the held-out loss that is due.

    The record is written after the checkpoint: a kill between the two leaves the loss to the next resume, in
    the checkpoint.

    Raises:
        NoRungLeftError: it does not fit this time either.
        ConfigError: the held-out loss is infinite or no number.
    """
    record = _record_without(run)
    if record is None:
        return
    known = run.evaluations
    loss = known.last_loss if known.last_step == run.step else None
    if loss is None:
        loss = evaluated(run)
        require_finite_held_out(run, loss)
        save(run)
    record = record.model_copy(update={"held_out_loss": loss, "held_out_perplexity": perplexity(loss)})
    run.folder.replace_metrics(record)
    run.view.step(record)
    run.accelerator.log(record.numbers(), step=record.step)


def _record_without(run: Run) -> StepRecord | None:
    if not (run.step and evaluation_is_due(run)):
        return None
    records = [record for record in run.folder.read_metrics() if record.step == run.step]
    return next((record for record in records if record.held_out_loss is None), None)
