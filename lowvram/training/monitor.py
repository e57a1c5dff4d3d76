"""Monitor: device memory in use now, and at its highest in each phase of a run, measured while training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from lowvram.engine.step import Backward, Clip
from lowvram.gpu_driver import OwnMemory, is_context, read_driver
from lowvram.memory.receipt import Phase
from lowvram.training.machine import GpuUse, Machine, MachineSample
from lowvram.training.machine_warnings import MachineRules
from lowvram.training.sampler import Sampler

_SAMPLE_SECONDS = 0.05  # a CPU step takes seconds; 20 reads cost 0.4 to 4 ms of a second


class Peak(NamedTuple):
    """Highest bytes; None where nothing counts them."""

    allocated: int | None = None
    reserved: int | None = None
    driver: int | None = None
    resident: int | None = None  # since before loading

    def joined(self, other: Peak) -> Peak:
        """The higher of both in each field."""
        return Peak(*(highest(pair) for pair in zip(self, other, strict=True)))


def highest(values: Iterable[int | None]) -> int | None:
    """The largest that is known."""
    return max((v for v in values if v is not None), default=None)


class MemoryMonitor:
    """On a GPU the allocator's counters and the driver's; on a CPU this process's resident bytes.

    The resident bytes also count what Python and the libraries add while training (tens of MB). The driver
    is asked when a phase ends for the first time and when more was reserved since: about ten times a run.
    """

    def __init__(self, backend: str) -> None:
        allocators = {"cuda": torch.cuda, "rocm": torch.cuda, "xpu": torch.xpu}
        self._allocator: Any = allocators.get(backend)  # None: no counters, the process is measured
        self._driver: OwnMemory | None = None
        self._asks_driver = backend == "cuda"
        self._process = psutil.Process()
        self._phase: Phase = "load"
        self._peaks: dict[Phase, Peak] = {}
        self._read_at_bytes = -1  # reserved when the driver was asked last
        self._baseline = self._resident = 0
        self._lock = threading.Lock()
        self.sampler: Sampler | None = None
        self.context_bytes: int | None = None  # highest so far; kernels are loaded at their first use

    def start(self, rules: MachineRules | None = None) -> None:
        """Begin with the phase `load`, before the model is loaded; `rules` make the warnings."""
        if self._allocator:
            self._driver = _own_memory() if self._asks_driver else None
            self._allocator.reset_peak_memory_stats()
            self.sampler = Sampler(Machine(self._gpu_use()), rules)
        else:
            self._baseline = self._resident = self._process.memory_info().rss
            self.sampler = Sampler(Machine(), rules, self._look_at_resident, _SAMPLE_SECONDS)
        self.sampler.start()

    def stop(self) -> None:
        if self.sampler:
            self.sampler.stop()

    @property
    def machine(self) -> MachineSample | None:
        """The newest look at the machine, at most a second old."""
        return self.sampler.latest if self.sampler else None

    def warnings(self) -> list[str]:
        """What the rules say about the machine, new since this was asked last."""
        return self.sampler.warnings() if self.sampler else []

    def enter(self, phase: Phase) -> None:
        """The phase so far is over, `phase` begins."""
        self._note()
        self._phase = phase
        if self._allocator:
            self._allocator.reset_peak_memory_stats()
        else:
            with self._lock:
                self._resident = self._process.memory_info().rss

    def forget(self) -> None:
        """Let the peaks so far go: what comes is measured by itself."""
        self.enter(self._phase)
        self._peaks.clear()

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """`phase`, then the one before it again."""
        outer = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def peaks(self) -> dict[Phase, Peak]:
        """The highest memory of each phase that there was."""
        self._note()
        return dict(self._peaks)

    @property
    def held_bytes(self) -> int | None:
        """What other processes held on the GPU at the start."""
        return self._driver.held_by_others_bytes if self._driver else None

    @property
    def now_bytes(self) -> int:
        """Reserved on a GPU, resident on a CPU."""
        if self._allocator:
            return int(self._allocator.memory_reserved())
        return max(self._process.memory_info().rss - self._baseline, 0)

    @property
    def peak_bytes(self) -> int:
        """The highest of `now_bytes` since the model was loaded."""
        after = [peak for phase, peak in self._peaks.items() if phase != "load"]
        peaks = [*after, self._current()]
        return highest(p.reserved if self._allocator else p.resident for p in peaks) or 0

    def _note(self) -> None:
        known = self._peaks.get(self._phase)
        driver = self._driver_bytes(first=known is None)
        self._peaks[self._phase] = (known or Peak()).joined(self._current()._replace(driver=driver))

    def _current(self) -> Peak:
        if not self._allocator:
            self._look_at_resident()
            with self._lock:
                return Peak(resident=max(self._resident - self._baseline, 0))
        stats = self._allocator.memory_stats()
        return Peak(stats.get("allocated_bytes.all.peak", 0), stats.get("reserved_bytes.all.peak", 0))

    def _driver_bytes(self, first: bool) -> int | None:
        """This process's bytes on the card when it is time to ask; a stranger's are no sum of ours."""
        if self._driver is None:
            return None
        reserved = int(self._allocator.memory_reserved())
        if not first and reserved <= self._read_at_bytes:
            return None
        self._read_at_bytes = reserved
        n_bytes = self._driver.now_bytes()
        if n_bytes is None or not is_context(n_bytes - reserved):
            return None
        self.context_bytes = highest((self.context_bytes, n_bytes - reserved))
        return n_bytes

    def _look_at_resident(self) -> None:
        with self._lock:
            self._resident = max(self._resident, self._process.memory_info().rss)

    def _gpu_use(self) -> GpuUse | None:
        if self._driver is None:
            return None
        return GpuUse(
            uuid=self._driver.uuid,
            name=self._driver.name,
            told_bytes=self._driver.told_bytes,
            reserved_bytes=self._allocator.memory_reserved,
            context_bytes=lambda: self.context_bytes,
        )


def _own_memory() -> OwnMemory:
    fresh = not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    before = read_driver()
    gpu = torch.cuda.get_device_properties(0)
    return OwnMemory(before, str(getattr(gpu, "uuid", "")), gpu.name, fresh)


def watched(monitor: MemoryMonitor, backward: Backward, clip: Clip) -> dict[str, Callable[..., Any]]:
    """`backward` and `clip` for a `train_step` within `during("forward")`, each a phase of its own."""

    def in_backward(loss: torch.Tensor) -> None:
        with monitor.during("backward"):
            backward(loss)

    def in_clip(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
        with monitor.during("clip"):
            norm = clip(parameters, max_norm)
        monitor.enter("optimizer")  # the update comes next, and ends the step
        return norm

    return {"backward": in_backward, "clip": in_clip}
