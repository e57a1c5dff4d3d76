"""A step and an evaluation of a run as it is run now, its memory measured phase by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from lowvram.data.tokens import Example
from lowvram.engine.batch import Batch
from lowvram.engine.config import StepConfig
from lowvram.engine.step import StepResult, evaluate, train_step
from lowvram.training.monitor import watched
from lowvram.training.recovery import recovering
from lowvram.training.run import Run


def micro_batches_now(run: Run, planned: Iterable[list[Example]]) -> Iterator[Batch]:
    """The planned micro-batches, cut to what a step has room for after a rung: the same examples in order."""
    for group in planned:
        for examples in parts(group, run.now):
            yield run.data.collate(examples, packed=run.now.packing)


def parts(examples: list[Example], step: StepConfig) -> Iterator[list[Example]]:
    """`examples` in order, each part within micro_batch examples, or packed within the tokens of a row.

    As in data/packed_order.py an example beyond a row's first `micro_batch` takes the room of a token more.
    """
    row_tokens = step.micro_batch * step.seq_len
    part: list[Example] = []
    used = 0
    for example in examples:
        extra = len(part) >= step.micro_batch
        full = used + len(example) + extra > row_tokens if step.packing else extra
        if part and full:
            yield part
            part, used, extra = [], 0, False
        part.append(example)
        used += len(example) + extra
    if part:
        yield part


def run_step(run: Run, batches: list[Batch], update: Callable[[], None] | None = None) -> StepResult:
    """Forward, backward, clip and update, each a phase of the monitor."""
    with run.monitor.during("forward"):
        run.largest_batch_tokens = max(run.largest_batch_tokens, *(b.limited_tokens for b in batches))
        return train_step(
            run.loss_of,
            run.optimizer,
            batches,
            max_grad_norm=run.plan.max_grad_norm,
            update=update,
            empty_cache=run.now.levers.empty_cache,
            **watched(run.monitor, run.accelerator.backward, run.accelerator.clip_grad_norm_),
        )


def held_out_loss(run: Run) -> float:
    """Mean loss of a held-out token, through the chunked loss of training: no logits are kept.

    Raises:
        NoRungLeftError: as `recovering`.
    """

    def attempt() -> float:
        with run.monitor.during("evaluation"):
            batches = micro_batches_now(run, run.data.held_out_micro_batches())
            return evaluate(run.loss_of, _telling(run, batches), run.device)

    return recovering(run, "evaluation", attempt)


def _telling(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    """A warning of the machine does not wait for the end of an evaluation, which may take minutes."""
    for batch in batches:
        run.tell_machine()
        yield batch


def evaluation_is_due(run: Run) -> bool:
    """Whether the held-out loss after this step is wanted: in its turn, and of the last one."""
    return run.step % run.plan.evaluate_every == 0 or run.step == run.plan.total_steps


def evaluated(run: Run) -> float:
    """The held-out loss after this step, and note whether it is the best."""
    loss = held_out_loss(run)
    run.evaluations.add(run.step, loss)
    return loss
