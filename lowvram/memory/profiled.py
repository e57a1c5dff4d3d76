"""What torch's profiler sees a really executed CPU step allocate: the truth that a trace is held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def profiled_peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes alive at one time of what `run` allocates."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    seen: Any = profile.profiler
    events = [e for e in seen.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
