"""One NVIDIA card watched while training: memory, heat, power, clocks; NVML stays open between looks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, TypeVar

from lowvram.frozen import Frozen
from lowvram.gpu_driver import Card, Driver, read_card

Throttle = Literal["heat", "power cap", "power brake", "slowdown"]
T = TypeVar("T")

# NVML's binary interface: these bits do not change, their names in nvidia-ml-py did (Throttle, then Event).
_THROTTLES: dict[int, Throttle] = {
    0x04: "power cap",  # the software's power limit
    0x08: "slowdown",  # by the hardware, for any of its reasons
    0x20: "heat",  # the driver's slowdown
    0x40: "heat",  # the hardware's, some degrees later
    0x80: "power brake",  # a power supply's or a laptop's signal
}


class CardReading(Frozen):
    """One look at a card. None: this card or driver does not tell; laptops often hide their power limit."""

    card: Card
    temperature_celsius: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    sm_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    throttle: tuple[Throttle, ...] | None = None  # () at full speed


class CardSensors:
    """Reads one card again and again. Never raises: a card that is lost in mid-run reads as None.

    NVML stays open from `open` to `close`: to open it takes milliseconds, to read it well under one.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, uuid: str, name: str) -> CardSensors | None:
        """The card that CUDA knows by this `uuid` and `name`; None where the driver does not have it."""
        try:
            import pynvml as nvml

            nvml.nvmlInit()
        except Exception:  # as in read_driver, which has told the user why
            return None
        with suppress(Exception):
            handle = _handle_of(nvml, uuid, name)
            if handle is not None:
                return cls(nvml, handle)
        with suppress(Exception):
            nvml.nvmlShutdown()
        return None

    def read(self) -> CardReading | None:
        """The card now."""
        nvml, handle, gpu = self._nvml, self._handle, self._nvml.NVML_TEMPERATURE_GPU
        card = told(lambda: read_card(nvml, handle, []))
        if card is None:
            return None
        return CardReading(
            card=card,
            temperature_celsius=told(lambda: nvml.nvmlDeviceGetTemperature(handle, gpu)),
            power_watts=_watts(lambda: nvml.nvmlDeviceGetPowerUsage(handle)),
            power_limit_watts=_watts(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle)),
            sm_clock_mhz=told(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            max_sm_clock_mhz=told(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
            throttle=self._throttle(),
        )

    def close(self) -> None:
        with suppress(Exception):
            self._nvml.nvmlShutdown()

    def _throttle(self) -> tuple[Throttle, ...] | None:
        nvml, handle = self._nvml, self._handle
        bits = told(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        if bits is None:  # before driver 535
            bits = told(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        if bits is None:
            return None
        return tuple(dict.fromkeys(reason for bit, reason in _THROTTLES.items() if bits & bit))


def _handle_of(nvml: Any, uuid: str, name: str) -> Any | None:
    handles: dict[str, Any] = {}
    cards: list[Card] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        with suppress(Exception):  # one lost card must not hide the others
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            cards.append(read_card(nvml, handle, []))
            handles[cards[-1].uuid] = handle
    card = Driver(cards=tuple(cards)).card(uuid, name)
    return None if card is None else handles[card.uuid]


def told(ask: Callable[[], T]) -> T | None:
    """None for what is not supported, not permitted, hidden in a container or broken since."""
    try:
        return ask()
    except Exception:  # broken drivers fail in ctypes, in decoding a string, anywhere
        return None


def _watts(ask_milliwatts: Callable[[], int]) -> float | None:
    milliwatts = told(ask_milliwatts)
    return None if milliwatts is None else round(milliwatts / 1000, 1)
