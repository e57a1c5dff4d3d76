"""Figures: all that is predicted of a decided step: memory, time, counts, the longest sequence."""

from __future__ import annotations

from typing import Any

from lowvram.data.stats import DataStats
from lowvram.engine.config import StepConfig
from lowvram.planner import initialisation
from lowvram.planner.host_memory import host_bytes
from lowvram.planner.schedule import Schedule
from lowvram.planner.search import Search


def figures(search: Search, step: StepConfig, schedule: Schedule, stats: DataStats | None) -> dict[str, Any]:
    """Fields of a Plan by name."""
    shape, estimate, seconds = search.model.shape, search.estimate(step), search.seconds(step)
    passes = search.work(step.seq_len, step.effective_batch).tokens(step.micro_batch, step.packing).passes
    run = search.time.run_seconds(seconds, schedule, stats, step.effective_batch)
    on_cpu = estimate.peak_allocated_bytes if search.backend == "cpu" else 0
    return {
        "estimate": estimate,
        "largest_seq_len": max(search.largest_seq_len(step, shape.context_limit), step.seq_len),
        "host_ram_bytes": host_bytes(step, shape) + on_cpu,
        "seconds_per_step": round(seconds, 3),
        "seconds_in_all": round(run + initialisation.seconds(step, seconds, passes), 1),
        "n_parameters": shape.n_parameters,
        "n_trainable": shape.n_trainable(step),
    }
