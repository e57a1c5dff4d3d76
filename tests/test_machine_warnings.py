"""What the monitor warns about: made-up looks in, sentences out, each trouble once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowvram.gpu_driver import GpuProcess
from lowvram.training.machine import Look, MachineSample
from lowvram.training.machine_warnings import CALM_SECONDS, Episode, MachineRules
from lowvram.units import GiB, MiB

RUN = Path("runs/demo")
PLANNED = 6 * GiB


def rules(planned: int = PLANNED) -> MachineRules:
    return MachineRules(RUN, planned, host_total_bytes=16 * GiB)


@dataclasses.dataclass
class Tape:
    """Looks one second apart at a machine whose values stay until they are changed."""

    said_by: MachineRules
    at: float = 1000.0
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    processes: tuple[GpuProcess, ...] = ()
    reserved: int | None = None

    def run(self, seconds: int, **changes: Any) -> list[str]:
        """Everything that is said in that time."""
        self.values |= changes
        said: list[str] = []
        for _ in range(seconds):
            self.at += 1
            look = Look(self.at, MachineSample(**self.values), self.processes, self.reserved)
            said += self.said_by.warnings(look)
        return said


@pytest.fixture
def tape() -> Tape:
    return Tape(rules())


def program(pid: int, name: str, used: int | None) -> GpuProcess:
    return GpuProcess(pid=pid, name=name, used_bytes=used)


# Episodes


def test_an_episode_is_said_once_and_again_only_after_a_calm_minute() -> None:
    episode = Episode(lasts_seconds=3)
    said = []
    for at in range(400):
        trouble = 10 <= at < 12 or 20 <= at < 100 or at in range(102, 130, 2) or 250 <= at < 260
        if episode.begins(float(at), on=trouble, off=not trouble):
            said.append(at)
    assert said == [23, 253]  # two seconds are no trouble; its flicker until 130 is the same one


def test_between_on_and_off_an_episode_goes_on() -> None:
    episode = Episode(lasts_seconds=0)
    assert episode.begins(0, on=True, off=False)
    assert not any(episode.begins(at, on=False, off=False) for at in range(1, 500))
    assert not episode.begins(500, on=True, off=False)
    assert not any(episode.begins(at, on=False, off=True) for at in range(501, 600))
    assert episode.begins(600, on=True, off=False)


# Another program on the GPU


def test_a_program_that_grows_is_named_with_both_numbers(tape: Tape) -> None:
    tape.reserved = 5 * GiB
    tape.processes = (program(7, "Xorg", 300 * MiB), program(8, "firefox", 200 * MiB))
    assert tape.run(60, gpu_others_bytes=500 * MiB, gpu_free_bytes=3 * GiB) == []
    tape.processes = (program(7, "Xorg", 310 * MiB), program(8, "firefox", 900 * MiB))
    (text,) = tape.run(600, gpu_others_bytes=1210 * MiB, gpu_free_bytes=2358 * MiB)
    assert text == (
        "firefox (pid 8) has 900 MiB of GPU memory, 200 MiB before. 2.30 GiB of the card are free, "
        "and this run may still take 1.00 GiB: enough. Do not start more there."
    )


def test_a_new_program_that_leaves_too_little_is_said_with_the_way_out(tape: Tape) -> None:
    tape.reserved = 4 * GiB
    assert tape.run(60, gpu_others_bytes=500 * MiB, gpu_free_bytes=2100 * MiB) == []
    tape.processes = (program(9, "blender", GiB),)
    (text,) = tape.run(600, gpu_others_bytes=1524 * MiB, gpu_free_bytes=1076 * MiB)
    assert text.startswith("blender (pid 9) has 1.00 GiB of GPU memory, 0 B before. 1.05 GiB of the card")
    assert "may still take 2.00 GiB: it may run out of memory" in text
    assert text.endswith("lowvram resume runs/demo")
    assert tape.run(10, gpu_others_bytes=500 * MiB, gpu_free_bytes=2100 * MiB) == []
    assert tape.run(60, gpu_others_bytes=1524 * MiB, gpu_free_bytes=1076 * MiB) == []  # the same game again
    assert tape.run(int(CALM_SECONDS) + 2, gpu_others_bytes=500 * MiB, gpu_free_bytes=2100 * MiB) == []
    assert len(tape.run(60, gpu_others_bytes=1524 * MiB, gpu_free_bytes=1076 * MiB)) == 1


def test_growth_that_becomes_too_much_is_a_second_warning(tape: Tape) -> None:
    tape.reserved = 5 * GiB
    tape.run(5, gpu_others_bytes=500 * MiB, gpu_free_bytes=3 * GiB)
    (first,) = tape.run(30, gpu_others_bytes=900 * MiB, gpu_free_bytes=2 * GiB)
    (second,) = tape.run(30, gpu_others_bytes=2500 * MiB, gpu_free_bytes=500 * MiB)
    assert "enough" in first
    assert "run out" in second


def test_what_already_leaves_too_little_is_not_said_again_when_it_grows(tape: Tape) -> None:
    tape.reserved = 5 * GiB
    tape.run(5, gpu_others_bytes=500 * MiB, gpu_free_bytes=GiB)
    assert len(tape.run(30, gpu_others_bytes=600 * MiB, gpu_free_bytes=924 * MiB)) == 1
    assert tape.run(30, gpu_others_bytes=900 * MiB, gpu_free_bytes=624 * MiB) == []


def test_where_the_driver_names_no_sizes_the_new_ones_are_named(tape: Tape) -> None:
    tape.reserved = PLANNED
    tape.processes = (program(7, "dwm.exe", None),)
    tape.run(5, gpu_others_bytes=500 * MiB, gpu_free_bytes=3 * GiB)
    tape.processes = (program(7, "dwm.exe", None), program(8, "game.exe", None))
    (text,) = tape.run(30, gpu_others_bytes=2500 * MiB, gpu_free_bytes=GiB)
    assert "Other programs have 2.44 GiB of GPU memory, 500 MiB before (new there: game.exe (pid 8))." in text
    hidden = Tape(rules())
    hidden.run(5, gpu_others_bytes=0, gpu_free_bytes=3 * GiB)
    assert "nvidia-smi lists them" in hidden.run(30, gpu_others_bytes=2 * GiB, gpu_free_bytes=GiB)[0]


def test_little_growth_and_growth_for_a_moment_are_nothing(tape: Tape) -> None:
    tape.reserved = PLANNED
    tape.run(5, gpu_others_bytes=500 * MiB, gpu_free_bytes=3 * GiB)
    assert tape.run(100, gpu_others_bytes=700 * MiB) == []
    assert tape.run(2, gpu_others_bytes=4 * GiB) == []
    assert tape.run(100, gpu_others_bytes=500 * MiB) == []


def test_too_little_from_the_start_is_nobody_s_fault(tape: Tape) -> None:
    """The plan's own margin is short: the proof before the first step says so, not the monitor."""
    tape.reserved = 0
    assert tape.run(100, gpu_others_bytes=500 * MiB, gpu_free_bytes=3 * GiB) == []


def test_the_least_that_others_had_counts(tape: Tape) -> None:
    """A browser that was closed after the start and is opened again takes memory that was free."""
    tape.reserved = PLANNED
    tape.run(5, gpu_others_bytes=2 * GiB, gpu_free_bytes=GiB)
    tape.run(5, gpu_others_bytes=GiB, gpu_free_bytes=2 * GiB)
    (text,) = tape.run(5, gpu_others_bytes=2 * GiB, gpu_free_bytes=GiB)
    assert "2.00 GiB of GPU memory, 1.00 GiB before" in text


# Heat and power


def test_heat_is_said_with_its_numbers_and_a_command(tape: Tape) -> None:
    cool = {"gpu_throttle": (), "gpu_temperature_celsius": 70, "gpu_power_limit_watts": 170.0}
    assert tape.run(60, **cool, gpu_clock_mhz=2000, gpu_max_clock_mhz=2100) == []
    hot = {"gpu_throttle": ("heat", "power cap"), "gpu_temperature_celsius": 88, "gpu_clock_mhz": 1410}
    assert tape.run(4, **hot) == []
    (text,) = tape.run(600, **hot)
    assert "88 °C, 1410 of 2100 MHz" in text
    assert text.endswith("sudo nvidia-smi -pl 136")


def test_a_card_at_its_power_limit_is_normal_and_one_far_below_its_clock_is_not(tape: Tape) -> None:
    full = {"gpu_power_watts": 115.0, "gpu_power_limit_watts": 115.0, "gpu_max_clock_mhz": 3000}
    assert tape.run(300, gpu_throttle=("power cap",), gpu_clock_mhz=2400, **full) == []
    battery = {"gpu_power_watts": 34.6, "gpu_power_limit_watts": 35.0, "gpu_clock_mhz": 900}
    (text,) = tape.run(300, **battery)
    assert "35 of 35 W, 900 of 3000 MHz" in text
    assert "Plug a laptop in" in text


def test_a_power_brake_needs_no_clock(tape: Tape) -> None:
    assert len(tape.run(100, gpu_throttle=("power brake", "slowdown"))) == 1


# Swap, RAM, spill


def test_swap_that_grows_while_ram_is_short(tape: Tape) -> None:
    assert tape.run(60, swap_used_bytes=GiB, host_available_bytes=8 * GiB, resident_bytes=2 * GiB) == []
    assert tape.run(60, swap_used_bytes=2 * GiB) == []  # idle programs, while half of the RAM is there
    (text,) = tape.run(600, host_available_bytes=2 * GiB, resident_bytes=9 * GiB)
    assert "2.00 GiB are in swap, 1.00 GiB before; this run has 9.00 GiB, 2.00 GiB of RAM are left" in text
    assert text.endswith("lowvram resume runs/demo")


def test_ram_that_is_nearly_full_is_said_before_the_system_kills(tape: Tape) -> None:
    assert tape.run(60, host_available_bytes=2 * GiB) == []
    (text,) = tape.run(600, host_available_bytes=700 * MiB, resident_bytes=13 * GiB)
    assert text.startswith("Only 700 MiB of 16.00 GiB of RAM are left")
    assert "this run has 13.00 GiB" in text
    assert "lowvram resume runs/demo" in text
    tape.run(600, host_available_bytes=int(1.2 * GiB))  # not yet enough: the same trouble
    assert tape.run(60, host_available_bytes=700 * MiB) == []


def test_a_spill_is_said_with_the_setting_that_forbids_it(tape: Tape) -> None:
    assert tape.run(60, gpu_spilled_bytes=0) == []
    (text,) = tape.run(600, gpu_spilled_bytes=700 * MiB)
    assert "at least 700 MiB" in text
    assert "Prefer No Sysmem Fallback" in text


# Nothing known


def test_nothing_known_is_nothing_said(tape: Tape) -> None:
    assert tape.run(200) == []


@pytest.mark.parametrize("known", [True, False])
def test_a_machine_without_numbers_in_between(tape: Tape, known: bool) -> None:
    """A driver that does not answer for a while ends no episode and begins none."""
    said: Callable[..., list[str]] = tape.run
    said(5, gpu_others_bytes=0, gpu_free_bytes=8 * GiB)
    assert len(said(5, gpu_others_bytes=GiB)) == 1
    assert said(200, gpu_others_bytes=None if not known else GiB) == []
    assert said(5, gpu_others_bytes=GiB) == []
