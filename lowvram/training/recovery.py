"""Recovery from running out of memory: the same work again, a rung lower, with nothing lost."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import nn

from lowvram.engine.recompute import switch_recompute
from lowvram.engine.step import SummedLoss
from lowvram.errors import OutOfMemoryError, first_line
from lowvram.frozen import write_atomically
from lowvram.hardware import Hardware, host_memory
from lowvram.memory.rung import Moment, Rung
from lowvram.planner.rungs import next_rung, plan_that_fits
from lowvram.shell import typed
from lowvram.training import checkpoint
from lowvram.training.run import Run
from lowvram.units import format_bytes

MOST_RUNGS = 3  # for one step: what three cannot mend is another program's doing, or a plan's
# cuBLAS and the driver fail in words of their own; torch's CPU allocator raises a plain RuntimeError.
_IN_WORDS = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator: .*allocate", re.I)
Result = TypeVar("Result")


class NoRungLeftError(Exception):
    """Three rungs did not help, or there is none; the run is as it was before what failed."""

    def __init__(self, moment: Moment, reason: str) -> None:
        super().__init__(reason)
        self.moment, self.reason = moment, reason


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller step may succeed where this one failed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _IN_WORDS.search(str(error)) is not None


def recovering(run: Run, moment: Moment, attempt: Callable[[], Result]) -> Result:
    """`attempt()`; where the device runs out of memory again one rung lower, at most three in a row.

    Whatever was half done is discarded: gradients go, the random generators are set back, parameters and
    optimizer are as they were, for the update itself is either whole or not begun (`whole_update`).

    Raises:
        NoRungLeftError: no rung helped.
    """
    rng, reason = checkpoint.collect_rng(), ""
    for rungs in range(MOST_RUNGS + 1):
        try:
            return attempt()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        # the error is gone, and with it the frames that held the failed step's tensors
        _let_go(run)
        checkpoint.restore_rng(rng)
        if rungs == MOST_RUNGS or not drop_rung(run, moment, reason):
            break
    raise NoRungLeftError(moment, reason)


def drop_rung(run: Run, moment: Moment, reason: str) -> bool:
    """Change to a leaner step; False where there is none."""
    run.view.note(f"Out of memory ({_place(run, moment)}). Looking for a leaner step.")
    lower = next_rung(run.now, run.source, _hardware_now(run), room_bytes(run.device))
    if lower is None:
        return False
    rung = Rung(
        at_step=run.step,
        moment=moment,
        reason=reason,
        changes=lower.changes,
        predicted_peak_reserved_bytes=lower.peak_reserved_bytes,
        step=lower.step,
    )
    before, after = format_bytes(run.predicted_bytes), format_bytes(rung.predicted_peak_reserved_bytes)
    take(run, [*run.rungs, rung])
    told = f"One rung down, with the same examples in each step: {rung.sentence}"
    run.tell("out of memory", f"{told}; {after} predicted instead of {before}. {reason}")
    return True


def _place(run: Run, moment: Moment) -> str:
    """`training, step 7`, and of the evaluation between steps 6 and 7: `evaluation, after step 6`."""
    if moment == "evaluation":
        return f"evaluation, after step {run.step}" if run.step else "evaluation, before step 1"
    return f"{moment}, step {run.step + 1}"


def take(run: Run, rungs: list[Rung]) -> None:
    """Run the step as the last of `rungs` says; none: as planned."""
    run.rungs = rungs
    now = run.now
    switch_recompute(run.model.get_base_model(), now.levers)
    run.loss_of = run.accelerator.prepare_model(SummedLoss(run.model, now).train())


def whole_update(optimizer: Any, device: torch.device) -> None:
    """`optimizer.step()`, all of it or nothing.

    What it allocates are states, one parameter after the other, before each is updated; those that it had
    reached already have counted one update more, and are left out when it is repeated.

    Raises:
        OutOfMemoryError: it failed twice and some parameters are ahead of others.
    """
    reason = _refused(optimizer.step)
    if reason is None:
        return
    ahead = _ahead(optimizer)
    if not ahead:
        raise torch.OutOfMemoryError(reason)  # nothing is changed yet: the step may be repeated
    for parameter in ahead:
        parameter.grad = None  # as an optimizer skips those without
    _empty_cache(device)
    if _refused(optimizer.step) is not None:
        raise OutOfMemoryError(
            f"The device ran out of memory in the middle of an update: {reason}",
            "Close other programs on the GPU and resume: the last checkpoint is whole.",
        )


def _refused(attempt: Callable[[], object]) -> str | None:
    """What the device said when it ran out of memory; None: it did not."""
    try:
        attempt()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return first_line(error)
    return None


def _ahead(optimizer: Any) -> list[nn.Parameter]:
    """Parameters that have been updated once more than others."""
    wanted = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    counts = {p: int(optimizer.state[p]["step"]) if optimizer.state.get(p) else 0 for p in wanted}
    least = min(counts.values())
    return [parameter for parameter, count in counts.items() if count > least]


def _let_go(run: Run) -> None:
    run.optimizer.zero_grad(set_to_none=True)
    forget_unscaling(run.accelerator.scaler)
    gc.collect()  # autograd's graphs are cycles
    _empty_cache(run.device)


def forget_unscaling(scaler: Any) -> None:
    """fp16's GradScaler refuses to unscale twice before an update; the gradients that it did are gone."""
    if scaler is not None:
        with suppress(AssertionError):  # nothing has been scaled yet
            scaler.update(scaler.get_scale())


def _hardware_now(run: Run) -> Hardware:
    """Probed before the model was loaded: a probe of a full GPU could find none."""
    return run.hardware.model_copy(update={"host_free_bytes": host_memory()[1]})


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()  # copies that still run read what is about to be freed
        torch.cuda.empty_cache()


def room_bytes(device: torch.device) -> int | None:
    """What the device gives this process now; None on a CPU."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())


def gave_up(run: Run, why: NoRungLeftError) -> OutOfMemoryError:
    """The end of a run that has been saved, with what is safe and what would fit."""
    room = room_bytes(run.device)
    had = f", {format_bytes(room)} are there" if room else ""
    message = (
        f"The device ran out of memory ({_place(run, why.moment)}), {len(run.rungs)} rungs below the "
        f"plan: predicted {format_bytes(run.predicted_bytes)}{had}. {why.reason.rstrip('.')}. "
        f"{checkpoint.what_is_safe(run.folder.checkpoints)}"
    )
    fits = plan_that_fits(run.plan, run.source, _hardware_now(run), room)
    again = f"Close other programs on the GPU, then: lowvram resume {typed(run.folder.path)}"
    if fits is None:
        return OutOfMemoryError(message, f"{again}; or take a smaller model.")
    file = run.folder.path / "leaner_plan.yaml"
    write_atomically(file, fits.to_yaml())
    needs = f"it needs {format_bytes(fits.estimate.peak_reserved_bytes)}, {fits.seq_len} tokens"
    return OutOfMemoryError(
        message, f"{again}; or begin anew with a plan that fits ({needs}): lowvram train {typed(file)}"
    )
