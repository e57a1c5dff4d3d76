"""The adapter's initialisation at the start of a run, from the first micro-batches in the plan's order."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil
import torch

from lowvram.engine.adapter_init import Means, initialise
from lowvram.engine.config import DATA_INITS
from lowvram.engine.host import Host
from lowvram.engine.weight_init import OriginalWeights

if TYPE_CHECKING:
    from lowvram.training.run import Run

_SHARE = 0.5  # of the free host memory may hold sums of gradients


def initialise_adapter(run: Run) -> None:
    """As planned, before the first step; what a resume finds in its checkpoint is never made again.

    Raises:
        ConfigError: as `engine.adapter_init.initialise`.
    """
    plan = run.plan
    if plan.init == "default" or run.step > 0:
        return
    started = time.perf_counter()
    looks = plan.init_batches if plan.init in DATA_INITS else 0
    batches = [run.data.collate(examples, plan.packing) for examples in run.data.first_micro_batches(looks)]
    with run.monitor.during("initialisation"):
        initialise(run.model, run.loss_of, plan, batches, _means(run))
        if run.device.type == "cuda":
            torch.cuda.synchronize()
    run.view.note(f"init {plan.init}: done in {time.perf_counter() - started:.1f} s")


def _means(run: Run) -> Means:
    return Means(
        host=Host(run.device),
        seed=run.plan.seed,
        original=OriginalWeights(run.source),
        room_bytes=int(_SHARE * psutil.virtual_memory().available),
        say=run.view.note,
    )
