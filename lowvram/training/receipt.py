"""Writes the receipt of a finished run into its folder, and a copy where the next plan looks for it."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import lowvram
from lowvram.cache import receipts_folder
from lowvram.frozen import write_atomically
from lowvram.memory.receipt import PHASES, Phase, PhaseMemory, Receipt
from lowvram.training.monitor import Peak

if TYPE_CHECKING:
    from lowvram.training.run import Run

_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def write_receipt(run: Run) -> None:
    """RUN/receipt.json, and its copy among all runs'; that the copy cannot be written is only said."""
    receipt = save_receipt(run)
    try:
        keep_copy(receipt)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        run.view.note(f"Later plans will not know this run's memory, no copy of its receipt is kept: {error}")


def save_receipt(run: Run) -> Receipt:
    """RUN/receipt.json as far as the run has come."""
    receipt = make_receipt(run)
    write_atomically(run.folder.receipt_file, receipt.model_dump_json(indent=2))
    return receipt


def keep_copy(receipt: Receipt) -> Path:
    """Put `receipt` among those of all runs, as 20261123T101112Z-1b2c3d4e5f60.json."""
    folder, text = receipts_folder(), receipt.model_dump_json(indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    date = receipt.finished_at[:19].replace("-", "").replace(":", "")
    file = folder / f"{date}Z-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    write_atomically(file, text)
    return file


def make_receipt(run: Run) -> Receipt:
    """What was predicted and what was measured."""
    plan, estimate, peaks = run.plan, run.plan.estimate, run.monitor.peaks()
    name, n_bytes = _device(run)
    return Receipt(
        finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=plan.model,
        step=plan.step,
        device=name,
        device_bytes=n_bytes,
        backend=plan.device.backend,
        budget_bytes=plan.budget_bytes,
        predicted_peak_allocated_bytes=estimate.peak_allocated_bytes,
        predicted_peak_reserved_bytes=estimate.peak_reserved_bytes,
        predicted_context_bytes=plan.device.context_bytes,
        **{f"measured_peak_{k}_bytes": v for k, v in whole_peak(peaks)._asdict().items()},
        measured_context_bytes=run.monitor.context_bytes,
        measured_held_bytes=run.monitor.held_bytes,
        measured_steps=run.measured_steps,
        rungs=tuple(run.rungs),
        largest_batch_tokens=run.largest_batch_tokens,
        phases=by_phase(estimate.phases_bytes, peaks),
        versions={"lowvram": lowvram.__version__, **{name: version(name) for name in _VERSIONS}},
    )


def by_phase(predicted_bytes: dict[str, int], peaks: dict[Phase, Peak]) -> dict[Phase, PhaseMemory]:
    """Each phase that was predicted or measured, in the order in which they happen."""
    return {
        phase: PhaseMemory(
            predicted_allocated_bytes=predicted_bytes.get(phase),
            **{f"measured_{k}_bytes": v for k, v in peaks.get(phase, Peak())._asdict().items()},
        )
        for phase in PHASES
        if phase in predicted_bytes or phase in peaks
    }


def whole_peak(peaks: dict[Phase, Peak]) -> Peak:
    """The highest of all phases but `other`, saving and what hooks do: not planned, so not compared."""
    whole = Peak()
    for phase, peak in peaks.items():
        if phase != "other":
            whole = whole.joined(peak)
    return whole


def _device(run: Run) -> tuple[str, int]:
    """Name and size of what the run was on; the plan's are those of a smaller card after --vram."""
    planned = run.plan.device
    module: Any = {"cuda": torch.cuda, "rocm": torch.cuda, "xpu": torch.xpu}.get(planned.backend)
    if module is None:
        return planned.name, planned.total_bytes
    gpu = module.get_device_properties(0)
    try:
        return gpu.name, module.mem_get_info(0)[1]
    except Exception:  # as in the probe: Intel cards without the management library
        return gpu.name, gpu.total_memory
