"""Monitor: device memory in use now and at its highest, measured while training."""

from __future__ import annotations

import threading
from typing import Any

import psutil
import torch

_SAMPLE_SECONDS = 0.05  # a CPU step takes seconds; 20 looks a second cost under 0.1 % of a core


class MemoryMonitor:
    """On a GPU the allocator's reserved bytes; on a CPU this process's resident bytes since `start`.

    The resident bytes also count what Python and the libraries add while training (tens of MB).
    """

    def __init__(self, backend: str) -> None:
        allocators = {"cuda": torch.cuda, "rocm": torch.cuda, "xpu": torch.xpu}
        self._allocator: Any = allocators.get(backend)  # None: no counters, the process is measured
        self._process = psutil.Process()
        self._baseline = self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="lowvram-memory")

    def start(self) -> None:
        """Begin, before the model is loaded."""
        if self._allocator:
            self._allocator.reset_peak_memory_stats()
            return
        self._baseline = self._peak = self._process.memory_info().rss
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def restart_peak(self) -> None:
        """Forget the peak so far: loading is over, stepping begins."""
        if self._allocator:
            self._allocator.reset_peak_memory_stats()
        else:
            self._peak = self._process.memory_info().rss

    @property
    def now_bytes(self) -> int:
        if self._allocator:
            return int(self._allocator.memory_reserved())
        return max(self._process.memory_info().rss - self._baseline, 0)

    @property
    def peak_bytes(self) -> int:
        if self._allocator:
            return int(self._allocator.max_memory_reserved())
        self._peak = max(self._peak, self._process.memory_info().rss)
        return max(self._peak - self._baseline, 0)

    @property
    def peak_allocated_bytes(self) -> int | None:
        """The allocator's allocated peak; None on a CPU, which has no such counter."""
        return int(self._allocator.max_memory_allocated()) if self._allocator else None

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)
