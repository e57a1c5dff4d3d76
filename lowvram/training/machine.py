"""The machine while training: one sample of GPU, driver, host memory and swap; what nobody tells is None."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil

from lowvram.frozen import Frozen
from lowvram.gpu_driver import Card, GpuProcess, in_wsl
from lowvram.gpu_sensors import CardReading, CardSensors, Throttle, told
from lowvram.hardware import host_memory


class MachineSample(Frozen):
    """One look at the machine. None: there is no NVIDIA card, or its driver or the system does not tell."""

    resident_bytes: int | None = None  # of this process in RAM
    host_available_bytes: int | None = None  # RAM that programs can still get; a container's share of it
    swap_used_bytes: int | None = None  # by the whole machine
    gpu_own_bytes: int | None = None  # this process on the card: tensors, cached blocks, context
    gpu_others_bytes: int | None = None
    gpu_free_bytes: int | None = None
    gpu_spilled_bytes: int | None = None  # at least so much of ours lies in RAM instead; Windows only
    gpu_temperature_celsius: int | None = None
    gpu_power_watts: float | None = None
    gpu_power_limit_watts: float | None = None
    gpu_clock_mhz: int | None = None  # of the multiprocessors
    gpu_max_clock_mhz: int | None = None
    gpu_throttle: tuple[Throttle, ...] | None = None  # why the clock is held down; () at full speed

    def numbers(self) -> dict[str, float]:
        """What trackers can plot."""
        return {name: value for name, value in self if isinstance(value, int | float)}


class Look(NamedTuple):
    """A sample and what is beside it: too long for a line of metrics, needed to say who and how much."""

    at_seconds: float  # of a clock that does not jump
    sample: MachineSample
    processes: tuple[GpuProcess, ...] = ()  # the others on the card
    reserved_bytes: int | None = None  # by this process's allocator


@dataclass(frozen=True)
class GpuUse:
    """What this process knows of its own memory on a card that the driver names by `uuid` and `name`."""

    uuid: str
    name: str
    told_bytes: Callable[[Card], int | None]  # the driver's word
    reserved_bytes: Callable[[], int]
    context_bytes: Callable[[], int | None]


class Machine:
    """Looks at the machine, from `open` to `close`. A look never raises."""

    def __init__(self, gpu: GpuUse | None = None) -> None:
        self._gpu = gpu
        self._sensors: CardSensors | None = None
        self._process = psutil.Process()
        self._may_spill = platform.system() == "Windows" or in_wsl()

    def open(self) -> None:
        if self._gpu is not None:
            self._sensors = CardSensors.open(self._gpu.uuid, self._gpu.name)

    def close(self) -> None:
        if self._sensors is not None:
            self._sensors.close()

    def look(self, at_seconds: float) -> Look:
        """The machine now; `at_seconds` is noted with it."""
        reading = self._sensors.read() if self._sensors else None
        host = {
            "resident_bytes": told(lambda: self._process.memory_info().rss),
            "host_available_bytes": told(lambda: host_memory()[1]),
            "swap_used_bytes": told(lambda: psutil.swap_memory().used),
        }
        if self._gpu is None or reading is None:
            return Look(at_seconds, MachineSample(**host))
        reserved = told(self._gpu.reserved_bytes)
        sample = MachineSample(**host, **self._memory(self._gpu, reading.card, reserved), **_state(reading))
        return Look(at_seconds, sample, reading.card.processes, reserved)

    def _memory(self, gpu: GpuUse, card: Card, reserved: int | None) -> dict[str, int | None]:
        """Where the driver does not tell our share, it is what the allocator took and the context."""
        context = told(gpu.context_bytes)
        ours = None if reserved is None or context is None else reserved + context
        spilled = spilled_bytes(ours, card) if self._may_spill else None
        own = told(lambda: gpu.told_bytes(card)) or ours
        others = None if own is None or spilled else max(0, card.total_bytes - card.free_bytes - own)
        return {
            "gpu_own_bytes": own,
            "gpu_others_bytes": others,
            "gpu_free_bytes": card.free_bytes,
            "gpu_spilled_bytes": spilled,
        }


def spilled_bytes(ours: int | None, card: Card) -> int | None:
    """How much of `ours`, allocator's bytes and context, cannot be on the card and so must be in RAM.

    Windows tells no process its shared GPU memory through NVML. But all that is in use on the card is at
    least ours as long as ours is there: what is missing has been moved. A lower bound, for what others have
    on the card is in use too: with 8 GiB of ours and 7.6 of an 8 GiB card in use, 0.4 GiB at least.
    """
    return None if ours is None else max(0, ours - (card.total_bytes - card.free_bytes))


def _state(reading: CardReading) -> dict[str, Any]:
    return {
        "gpu_temperature_celsius": reading.temperature_celsius,
        "gpu_power_watts": reading.power_watts,
        "gpu_power_limit_watts": reading.power_limit_watts,
        "gpu_clock_mhz": reading.sm_clock_mhz,
        "gpu_max_clock_mhz": reading.max_sm_clock_mhz,
        "gpu_throttle": reading.throttle,
    }
