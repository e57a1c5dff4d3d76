"""Sets up a run: the model with its adapters, optimizer, schedule and data, as planned."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, set_seed
from transformers import get_scheduler

from lowvram import hardware
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.batch import start_token
from lowvram.engine.model import load
from lowvram.engine.optimizer import make_optimizer
from lowvram.engine.source import ModelSource
from lowvram.engine.step import SummedLoss
from lowvram.errors import ConfigError
from lowvram.hardware import host_memory
from lowvram.planner.plan import Plan
from lowvram.training.data import PreparedData, training_data
from lowvram.training.evaluation import evaluation_notes
from lowvram.training.live import View
from lowvram.training.machine_warnings import MachineRules
from lowvram.training.monitor import MemoryMonitor
from lowvram.training.plan_changes import counts
from lowvram.training.run import Run
from lowvram.training.run_folder import RunFolder


def set_up(
    plan: Plan,
    folder: RunFolder,
    source: ModelSource,
    prepared: PreparedData,
    view: View,
    monitor: MemoryMonitor,
) -> Run:
    """Load, adapt, prepare: a run before its first step.

    Raises:
        ConfigError: the weights or the data are not what was planned, or several processes were started.
    """
    accelerator = _accelerator(plan, folder)
    monitor.start(MachineRules(folder.path, plan.estimate.peak_reserved_bytes, host_memory()[0]))
    here = hardware.probe(trial=False)
    set_seed(plan.seed)
    tokenizer = source.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    data = training_data(
        plan, prepared, pad, start_token(source.config) if source.config.is_encoder_decoder else None
    )
    for note in evaluation_notes(plan, prepared):
        view.note(note)
    view.note(f"Loading {plan.model} in {plan.base_precision} on {accelerator.device}")
    model = add_adapters(load(source, plan, str(accelerator.device)), plan).train()
    loss_of = SummedLoss(model, plan)
    optimizer = make_optimizer(trainable(model), plan, plan.learning_rate)
    name = "constant_with_warmup" if plan.schedule == "constant" else plan.schedule
    scheduler = get_scheduler(name, optimizer, plan.warmup_steps, plan.total_steps)
    loss_of, optimizer = accelerator.prepare(loss_of, optimizer)
    monitor.enter("other")
    return Run(
        plan,
        folder,
        source,
        view,
        accelerator,
        monitor,
        here,
        model,
        loss_of,
        optimizer,
        scheduler,
        data,
        plan.deciding,
        counts(prepared),
    )


def _accelerator(plan: Plan, folder: RunFolder) -> Accelerator:
    """Loss scaling for fp16, and no autocast: the model already computes in the planned dtype, as traced."""
    fp16 = plan.compute_dtype == "fp16"
    accelerator = Accelerator(
        cpu=plan.device.backend == "cpu",
        mixed_precision="fp16" if fp16 else "no",
        kwargs_handlers=[AutocastKwargs(enabled=False)],
        log_with=list(plan.log_with) or None,
        project_dir=str(folder.path),
    )
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"{accelerator.num_processes} processes were started; lowvram trains on one GPU.",
            "Start it without accelerate launch or torchrun.",
        )
    if plan.log_with:
        flat = plan.model_dump(mode="json", include={"rank", "alpha", "seq_len", "learning_rate", "seed"})
        accelerator.init_trackers("lowvram", config=flat)
    return accelerator
