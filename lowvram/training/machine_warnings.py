"""What to warn about while training: looks at the machine in, sentences out, each trouble said once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lowvram.gpu_driver import GpuProcess
from lowvram.gpu_problems import NO_SPILL_STEPS
from lowvram.shell import typed
from lowvram.training.machine import Look, MachineSample
from lowvram.units import MiB, format_bytes

CALM_SECONDS = 60.0  # a trouble that comes back sooner is the same one: a game's menu, a fan's turns
GROWN_BYTES = 256 * MiB  # a browser's tab takes less; kernels that are loaded late may look like so much
SWAPPED_BYTES = 256 * MiB
SPILLED_BYTES = 64 * MiB
HARD_CAP = 0.6  # of the highest clock; cards at their rated power run at 70 to 95 %
LOW_SHARE, ENOUGH_SHARE = 0.06, 0.10  # of the RAM
LOW_BYTES = 512 * MiB


class Episode:
    """One trouble: said when it has lasted, and again only after it was away for CALM_SECONDS.

    >>> heat = Episode(lasts_seconds=5)
    >>> [heat.begins(at, on=True, off=False) for at in (0, 3, 6, 9)]
    [False, False, True, False]
    """

    def __init__(self, lasts_seconds: float) -> None:
        self._lasts_seconds = lasts_seconds
        self._said = False
        self._since: float | None = None  # when it came, or after it was said: when it went

    def begins(self, at_seconds: float, on: bool, off: bool) -> bool:
        """Whether to say it now. Between `on` and `off` lies what is neither: it ends no episode."""
        if not (off if self._said else on):
            self._since = None
            return False
        self._since = at_seconds if self._since is None else self._since
        lasted = at_seconds - self._since >= (CALM_SECONDS if self._said else self._lasts_seconds)
        if lasted:
            self._said, self._since = not self._said, None
        return lasted and self._said


class MachineRules:
    """What to say after each look, in the order of the looks.

    Args:
        planned_bytes: what the allocator is predicted to reserve at most; 0 when nothing is predicted.
        host_total_bytes: RAM of the machine or container.
    """

    def __init__(self, run: Path, planned_bytes: int, host_total_bytes: int) -> None:
        self._resume = f"lowvram resume {typed(run)}"
        self._planned_bytes, self._host_total_bytes = planned_bytes, host_total_bytes
        self._others = _Others()
        self._least_swap_bytes: int | None = None
        self._short, self._grown = Episode(3), Episode(3)
        self._swap, self._host, self._spill = Episode(3), Episode(3), Episode(3)
        self._heat, self._power = Episode(5), Episode(30)

    def warnings(self, look: Look) -> list[str]:
        rules: tuple[Callable[[Look], str | None], ...] = (
            self._other_programs,
            self._hot,
            self._power_capped,
            self._spilled,
            self._swapping,
            self._host_full,
        )
        return [text for rule in rules if (text := rule(look)) is not None]

    def _other_programs(self, look: Look) -> str | None:
        others, free = look.sample.gpu_others_bytes, look.sample.gpu_free_bytes
        if others is None or free is None:
            return None
        grown = self._others.grown_bytes(others, look.processes)
        needed = max(0, self._planned_bytes - (look.reserved_bytes or 0))
        is_short = free < needed and grown >= GROWN_BYTES / 4
        short = self._short.begins(look.at_seconds, is_short, not is_short)
        more = self._grown.begins(look.at_seconds, grown >= GROWN_BYTES, grown < GROWN_BYTES / 2)
        if not (short or (more and not is_short)):  # short of memory is said once, not as growth again
            return None
        what = f"{self._others.who(look.processes)} {format_bytes(free)} of the card are free"
        if is_short:
            return (
                f"{what}, and this run may still take {format_bytes(needed)}: it may run out of memory. "
                f"Close that program, or stop with Ctrl-C, which saves everything, and later: {self._resume}"
            )
        return f"{what}, and this run may still take {format_bytes(needed)}: enough. Do not start more there."

    def _hot(self, look: Look) -> str | None:
        sample = look.sample
        if sample.gpu_throttle is None:
            return None
        hot = "heat" in sample.gpu_throttle
        if not self._heat.begins(look.at_seconds, hot, not hot):
            return None
        degrees = sample.gpu_temperature_celsius
        at = "" if degrees is None else f", {degrees} °C"
        return (
            f"The GPU is slowed down by its heat{at}{_clock(sample)}: training takes longer. Clear its fans "
            f"and air ways, or let it take less power: {_less_power(sample)}"
        )

    def _power_capped(self, look: Look) -> str | None:
        """A card at its power limit is normal, one far below its clock is not: a laptop on battery."""
        sample = look.sample
        if sample.gpu_throttle is None:
            return None
        clock, top = sample.gpu_clock_mhz, sample.gpu_max_clock_mhz
        slow = clock is not None and top is not None and clock < HARD_CAP * top
        capped = "power brake" in sample.gpu_throttle or ("power cap" in sample.gpu_throttle and slow)
        if not self._power.begins(look.at_seconds, capped, not capped):
            return None
        return (
            f"The GPU is held back by its power supply{_power(sample)}{_clock(sample)}: training takes "
            "longer. Plug a laptop in and choose its performance mode; nvidia-smi -q -d POWER says more."
        )

    def _spilled(self, look: Look) -> str | None:
        spilled = look.sample.gpu_spilled_bytes
        if spilled is None:
            return None
        if not self._spill.begins(look.at_seconds, spilled >= SPILLED_BYTES, spilled < SPILLED_BYTES / 2):
            return None
        return (
            f"Windows has moved at least {format_bytes(spilled)} of this run from the GPU to RAM: steps take "
            f"many times longer. Close other programs on the GPU; to get an error instead: {NO_SPILL_STEPS}"
        )

    def _swapping(self, look: Look) -> str | None:
        """More in swap than at its least so far, while RAM is short; systems put idle programs there too."""
        used, left = look.sample.swap_used_bytes, look.sample.host_available_bytes
        if used is None or left is None:
            return None
        least = used if self._least_swap_bytes is None else min(used, self._least_swap_bytes)
        self._least_swap_bytes = least
        on = used - least >= SWAPPED_BYTES and left < 0.2 * self._host_total_bytes
        if not self._swap.begins(look.at_seconds, on, used - least < SWAPPED_BYTES / 2):
            return None
        return (
            f"The machine has begun to swap: {format_bytes(used)} are in swap, {format_bytes(least)} before; "
            f"{_ours(look.sample)}{format_bytes(left)} of RAM are left. Close other programs, or stop with "
            f"Ctrl-C, which saves everything, and continue when more is free: {self._resume}"
        )

    def _host_full(self, look: Look) -> str | None:
        left, total = look.sample.host_available_bytes, self._host_total_bytes
        if left is None:
            return None
        low = left < max(LOW_BYTES, LOW_SHARE * total)
        if not self._host.begins(look.at_seconds, low, left >= max(2 * LOW_BYTES, ENOUGH_SHARE * total)):
            return None
        return (
            f"Only {format_bytes(left)} of {format_bytes(total)} of RAM are left; {_ours(look.sample)}the "
            f"system may kill it. Close other programs; a run that was killed goes on with: {self._resume}"
        )


class _Others:
    """What other programs have on the card, against the least that they had."""

    def __init__(self) -> None:
        self._least_bytes: int | None = None
        self._then: dict[int, GpuProcess] = {}
        self._now_bytes = 0

    def grown_bytes(self, now_bytes: int, processes: tuple[GpuProcess, ...]) -> int:
        self._now_bytes = now_bytes
        if self._least_bytes is None or now_bytes < self._least_bytes:
            self._least_bytes = now_bytes
            self._then = {process.pid: process for process in processes}
        return now_bytes - self._least_bytes

    def who(self, processes: tuple[GpuProcess, ...]) -> str:
        """A sentence with both numbers; on Windows and in containers the driver gives no program's bytes."""
        grown = max(processes, key=self._growth_bytes, default=None)
        if grown is not None and grown.used_bytes is not None and self._growth_bytes(grown) > 0:
            before = grown.used_bytes - self._growth_bytes(grown)
            took = f"{format_bytes(grown.used_bytes)} of GPU memory, {format_bytes(before)} before"
            return f"{grown.name} (pid {grown.pid}) has {took}."
        took = f"{format_bytes(self._now_bytes)} of GPU memory, {format_bytes(self._least_bytes or 0)} before"
        new = [
            f"{process.name} (pid {process.pid})" for process in processes if process.pid not in self._then
        ]
        hint = f"new there: {', '.join(new)}" if new else "nvidia-smi lists them"
        return f"Other programs have {took} ({hint})."

    def _growth_bytes(self, process: GpuProcess) -> int:
        before = self._then.get(process.pid)
        return (process.used_bytes or 0) - ((before.used_bytes or 0) if before else 0)


def _ours(sample: MachineSample) -> str:
    n_bytes = sample.resident_bytes
    return "" if n_bytes is None else f"this run has {format_bytes(n_bytes)}, "


def _clock(sample: MachineSample) -> str:
    clock, top = sample.gpu_clock_mhz, sample.gpu_max_clock_mhz
    return "" if clock is None or top is None else f", {clock} of {top} MHz"


def _power(sample: MachineSample) -> str:
    watts, limit = sample.gpu_power_watts, sample.gpu_power_limit_watts
    return "" if watts is None or limit is None else f", {watts:.0f} of {limit:.0f} W"


def _less_power(sample: MachineSample) -> str:
    limit = sample.gpu_power_limit_watts
    return f"sudo nvidia-smi -pl {'WATTS' if limit is None else round(0.8 * limit)}"
