"""The sampler and what it looks at: a card that answers, half answers or is lost; a real run on the CPU."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pynvml  # type: ignore[import-untyped]
import pytest

from lowvram.gpu_driver import Card, OwnMemory, read_driver
from lowvram.gpu_sensors import CardSensors
from lowvram.training import machine as machine_file
from lowvram.training import sampler as sampler_file
from lowvram.training.events import Event
from lowvram.training.machine import GpuUse, Look, Machine, MachineSample, spilled_bytes
from lowvram.training.machine_warnings import MachineRules
from lowvram.training.metrics import StepRecord
from lowvram.training.monitor import MemoryMonitor
from lowvram.training.run_folder import RunFolder
from lowvram.training.sampler import Sampler
from lowvram.units import GiB, MiB
from tests.fake_gpu import STRANGER, UUID, FakeCard, fake_driver
from tests.test_live import record
from tests.test_pipeline import SHORT, Run, home, run

__all__ = ["home", "run"]  # fixtures

SENSORS = (
    *("nvmlDeviceGetTemperature", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetEnforcedPowerLimit"),
    *("nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetCurrentClocksEventReasons"),
)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    card = FakeCard()
    fake_driver(monkeypatch, card)
    return card


def use_of(card: FakeCard, fresh: bool = True, context: int | None = FakeCard.context) -> GpuUse:
    """As MemoryMonitor makes it, from a process that is about to use the card."""
    own = OwnMemory(read_driver(), card.uuid, card.name, fresh)
    return GpuUse(own.uuid, own.name, own.told_bytes, lambda: card.pool, lambda: context)


def look_at(card: FakeCard, **changes: Any) -> Look:
    machine = Machine(use_of(card, **changes))
    card.use()
    card.pool = 2 * GiB
    machine.open()
    look = machine.look(5.0)
    machine.close()
    return look


def refuse(*_: object) -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


# --- one look ---


def test_a_healthy_card_tells_everything(card: FakeCard) -> None:
    card.throttle = 0x04 | 0x20 | 0x40 | 0x01  # idle is no reason to warn
    look = look_at(card)
    sample = look.sample
    assert sample.gpu_own_bytes == 2 * GiB + 180 * MiB
    assert sample.gpu_free_bytes == (7938 - 400 - 180) * MiB - 2 * GiB
    assert sample.gpu_others_bytes == (8188 - 7938 + 400) * MiB  # 250 MiB of it are the driver's own
    assert (sample.gpu_temperature_celsius, sample.gpu_power_watts) == (71, 98.4)
    assert (sample.gpu_power_limit_watts, sample.gpu_clock_mhz, sample.gpu_max_clock_mhz) == (115, 2400, 3105)
    assert sample.gpu_throttle == ("power cap", "heat")
    assert [(one.pid, one.used_bytes) for one in look.processes] == [(STRANGER, 400 * MiB)]
    assert (look.at_seconds, look.reserved_bytes) == (5.0, 2 * GiB)
    assert MachineSample.model_validate_json(sample.model_dump_json()) == sample


def test_the_host_s_numbers_are_the_system_s() -> None:
    sample = Machine().look(0).sample
    assert sample.resident_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    assert sample.host_available_bytes is not None
    assert 0 < sample.host_available_bytes <= psutil.virtual_memory().total
    assert sample.swap_used_bytes == pytest.approx(psutil.swap_memory().used, abs=64 * MiB)
    assert sample.gpu_own_bytes is None


@pytest.mark.parametrize("missing", SENSORS)
def test_a_sensor_that_is_missing_costs_only_its_number(
    card: FakeCard, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = look_at(card).sample.model_dump(exclude={"host_available_bytes", "resident_bytes"})
    monkeypatch.setattr(pynvml, missing, refuse)
    part = look_at(card).sample.model_dump(exclude={"host_available_bytes", "resident_bytes"})
    if missing == "nvmlDeviceGetCurrentClocksEventReasons":
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda _: 0x40)
        assert look_at(card).sample.gpu_throttle == ("heat",)  # drivers before 535
    assert [name for name in whole if part[name] != whole[name]] == [
        name for name in whole if part[name] is None and whole[name] is not None
    ]
    assert sum(part[name] != whole[name] for name in whole) == 1


def test_without_the_driver_s_word_our_share_is_what_was_taken_and_the_context(card: FakeCard) -> None:
    card.shows_own = False  # Windows, WSL, containers
    assert look_at(card).sample.gpu_own_bytes == 2 * GiB + 180 * MiB
    card.held += GiB  # somebody else's: it must not count as ours
    sample = look_at(card).sample
    assert sample.gpu_own_bytes == 2 * GiB + 180 * MiB
    assert sample.gpu_others_bytes == (8188 - 7938 + 400) * MiB + GiB
    unknown = look_at(card, context=None).sample
    assert (unknown.gpu_own_bytes, unknown.gpu_others_bytes) == (None, None)


def test_a_stranger_under_our_number_is_not_us(card: FakeCard) -> None:
    card.shows_own = False
    card.others = {os.getpid(): 300 * MiB}
    assert look_at(card).sample.gpu_own_bytes == 2 * GiB + 180 * MiB


def test_a_lost_card_leaves_the_host(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(use_of(card))
    machine.open()
    assert machine.look(0).sample.gpu_free_bytes is not None
    for name in ("nvmlDeviceGetMemoryInfo", *SENSORS):
        monkeypatch.setattr(pynvml, name, refuse)
    lost = machine.look(1).sample
    assert lost.gpu_free_bytes is None
    assert lost.resident_bytes is not None


def test_no_driver_no_package_and_no_such_card(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = SimpleNamespace(uuid="other", name="another card")
    assert CardSensors.open(stranger.uuid, stranger.name) is None
    assert CardSensors.open(UUID, "renamed") is not None
    assert CardSensors.open("", card.name) is not None  # the only card
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert CardSensors.open(UUID, card.name) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert CardSensors.open(UUID, card.name) is None


def test_nvml_is_opened_once_and_closed_once(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, calls = Machine(use_of(card)), []
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda name=name: calls.append(name))
    machine.open()
    for at in range(20):
        assert machine.look(at).sample.gpu_free_bytes is not None
    machine.close()
    assert calls == ["nvmlInit", "nvmlShutdown"]


# --- spill ---


def card_with(used: int) -> Card:
    return Card(
        uuid="u",
        name="n",
        total_bytes=8 * GiB,
        free_bytes=8 * GiB - used,
        capability=None,
        own_bytes=None,
        processes=(),
    )


@pytest.mark.parametrize(
    ("ours", "used", "spilled"),
    [
        (4 * GiB, 5 * GiB, 0),
        (8 * GiB, int(7.5 * GiB), GiB // 2),  # more than the whole card has in use
        (10 * GiB, 8 * GiB, 2 * GiB),
        (None, 8 * GiB, None),
    ],
)
def test_what_is_not_on_the_card_is_in_ram(ours: int | None, used: int, spilled: int | None) -> None:
    assert spilled_bytes(ours, card_with(used)) == spilled


def test_a_spill_is_looked_for_on_windows_only(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    card.shows_own = False
    assert look_at(card).sample.gpu_spilled_bytes is None
    monkeypatch.setattr(machine_file.platform, "system", lambda: "Windows")
    assert look_at(card).sample.gpu_spilled_bytes == 0
    big = Machine(GpuUse(card.uuid, card.name, lambda _: None, lambda: 10 * GiB, lambda: 180 * MiB))
    big.open()
    sample = big.look(0).sample
    in_use = 8188 * MiB - card.free
    assert sample.gpu_spilled_bytes == 10 * GiB + 180 * MiB - in_use
    assert sample.gpu_others_bytes is None  # what is left of the card cannot be told apart


# --- the thread ---


class _Told:
    """A machine in a script, and rules that say what it saw."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.looks: list[float] = []
        self.fail_at = fail_at
        self.seen = threading.Event()
        self.closed = False

    def open(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    def look(self, at: float) -> Look:
        self.looks.append(at)
        if len(self.looks) == self.fail_at:
            raise ZeroDivisionError("a mistake of ours")
        if len(self.looks) == 3:
            self.seen.set()
        return Look(at, MachineSample(resident_bytes=len(self.looks)))

    def warnings(self, look: Look) -> list[str]:
        return [f"look {look.sample.resident_bytes}"]


def sampler_of(told: _Told, clock: Callable[[], float], tick: Callable[[], None]) -> Sampler:
    return Sampler(cast(Machine, told), cast(MachineRules, told), tick, tick_seconds=0.001, clock=clock)


def test_a_look_a_second_and_warnings_in_order_on_this_thread() -> None:
    told, now = _Told(), [100.0]

    def tick() -> None:
        now[0] += 0.25

    sampler = sampler_of(told, lambda: now[0], tick)
    sampler.start()
    assert told.seen.wait(30)
    sampler.stop()
    assert told.looks[:3] == [100.0, 101.0, 102.0]
    said = sampler.warnings()
    assert said[:3] == ["look 1", "look 2", "look 3"]
    assert sampler.warnings() == []
    assert sampler.latest is not None
    assert told.closed
    assert sampler.cpu_seconds > 0


def test_after_a_pause_of_the_machine_the_missed_looks_are_not_made_up_for() -> None:
    told, steps = _Told(), iter([0.0, 0.0, 0.0, 5000.0, 5000.0])
    clock = lambda: next(steps, 5000.5)  # noqa: E731
    ticks: list[int] = []
    enough = threading.Event()

    def tick() -> None:
        ticks.append(1)
        if len(ticks) > 20:
            enough.set()

    sampler = sampler_of(told, clock, tick)
    sampler.start()
    assert enough.wait(30)
    sampler.stop()
    assert len(told.looks) == 2


def test_a_mistake_in_the_thread_is_said_once_and_the_ticks_go_on() -> None:
    told, now, ticks = _Told(fail_at=2), [0.0], threading.Semaphore(0)

    def tick() -> None:
        now[0] += 1.0
        ticks.release()

    sampler = sampler_of(told, lambda: now[0], tick)
    sampler.start()
    for _ in range(20):
        assert ticks.acquire(timeout=30)
    sampler.stop()
    assert sampler.warnings() == [
        "look 1",
        "The machine is not watched any more: ZeroDivisionError: a mistake of ours.",
    ]
    assert len(told.looks) == 2


def test_a_driver_that_hangs_keeps_no_finished_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_file, "_JOIN_SECONDS", 0.1)
    hangs, told = threading.Event(), _Told()
    monkeypatch.setattr(told, "look", lambda _: hangs.wait(60))
    sampler = sampler_of(told, time.monotonic, lambda: None)
    sampler.start()
    sampler.stop()
    assert not told.closed  # it was left behind, a daemon
    hangs.set()
    monkeypatch.setattr(sampler_file, "_JOIN_SECONDS", 30.0)
    sampler.stop()
    assert told.closed


def test_a_monitor_that_never_started_has_nothing_to_say() -> None:
    monitor = MemoryMonitor("cpu")
    assert monitor.machine is None
    assert monitor.warnings() == []
    monitor.stop()


# --- the records ---


def test_a_line_without_a_machine_still_loads(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    old = {name: value for name, value in record(1) if name != "machine"}
    folder.metrics_file.write_text(json.dumps(old) + "\n")
    folder.append_metrics(record(2, machine=MachineSample(gpu_throttle=("heat",), gpu_power_watts=98.4)))
    first, second = folder.read_metrics()
    assert first.machine is None
    assert second.machine == MachineSample(gpu_throttle=("heat",), gpu_power_watts=98.4)
    line = json.loads(folder.metrics_file.read_text().splitlines()[1])
    assert line["machine"] == {"gpu_throttle": ["heat"], "gpu_power_watts": 98.4}  # nothing that is unknown


def test_trackers_get_flat_numbers() -> None:
    sample = MachineSample(gpu_temperature_celsius=71, gpu_power_watts=98.4, gpu_throttle=("heat",))
    numbers = record(1, machine=sample).numbers()
    assert numbers["gpu_temperature_celsius"] == 71
    assert numbers["gpu_power_watts"] == 98.4
    assert all(isinstance(value, int | float) for value in numbers.values())
    assert {"step", "total_steps", "machine", "gpu_throttle"}.isdisjoint(numbers)
    plain = StepRecord(**dict(record(1))).numbers()
    assert plain["loss"] == record(1).loss


# --- a real run ---


def test_a_real_run_records_the_machine_and_tells_warnings(
    home: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rules that warn at every look: the texts reach the screen's file, also within evaluations."""
    monkeypatch.setattr(MachineRules, "warnings", lambda *_: ["Close the other program."])
    others = _watchers()
    given = ("auto", "--model", home / "tiny", "--data", home / "rows.jsonl", *SHORT)
    code, out, err = run(*given, "-o", tmp_path / "run")
    assert code == 0, err
    assert "memory by phase" in out
    folder = RunFolder(tmp_path / "run")
    records, events = folder.read_metrics(), [e for e in folder.read_events() if e.kind == "machine"]
    assert len(records) == 2
    for one in records:
        assert one.machine is not None
        assert one.machine.resident_bytes is not None
        assert one.machine.resident_bytes > 100 * MiB  # torch alone
        assert one.machine.gpu_own_bytes is None
    assert events
    assert {event.text for event in events} == {"Close the other program."}
    steps = {event.step for event in events}
    assert 0 in steps  # within the evaluation before the first step
    assert steps <= {0, 1, 2}
    assert all(isinstance(event, Event) for event in events)
    assert _watchers() <= others


def _watchers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "lowvram-monitor"}
