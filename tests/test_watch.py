"""`lowvram watch`: reads what another process writes, in every state of a run, and changes nothing."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowvram.errors import ConfigError
from lowvram.phases_view import phases_table, show_phases
from lowvram.training import file_lock
from lowvram.training.events import Event
from lowvram.training.machine import MachineSample
from lowvram.training.metrics import StepRecord
from lowvram.training.run_folder import LOCK, RunFolder
from lowvram.units import GiB, MiB
from lowvram.watch import Tail, watch
from tests.test_live import plain, record, terminal, written
from tests.test_pipeline import SHORT, home, run
from tests.test_receipts import _receipt

__all__ = ["home", "run"]  # fixtures
MAIN = "from lowvram.cli import main; main()"
HOLD = """
import sys, time
from pathlib import Path
from lowvram.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(600)
"""
RESULT = {
    "model": "m",
    "data": "d",
    "steps": 60,
    "held_out_loss_before": 2.0,
    "held_out_loss_after": 1.0,
    "trained_tokens": 10,
    "tokens": 20,
    "seconds": 3.0,
    "tokens_per_second": 7.0,
    "adapter_bytes": 1000,
    "stop_reason": "finished",
}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that has a plan and nothing else."""
    path = tmp_path / "a run"
    path.mkdir()
    (path / "plan.yaml").write_text("version: 1\n")
    return RunFolder(path)


@contextmanager
def held(folder: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder, as one that trains does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def finish(folder: RunFolder) -> None:
    folder.adapter.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder.adapter / name).write_bytes(b"")
    folder.result_file.write_text(json.dumps(RESULT))
    folder.receipt_file.write_text(_receipt().model_dump_json())


def follow(folder: RunFolder, *acts: Callable[[], object], console: Console | None = None) -> list[str]:
    """What is printed while one act happens in each pause; after the last, Ctrl-C."""
    console, left = console or plain(), iter(acts)

    def pause(_: float) -> None:
        act = next(left, None)
        if act is None:
            raise KeyboardInterrupt
        act()

    watch(folder.path, console, pause=pause)
    return written(console).splitlines()


def snapshot(folder: RunFolder) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.path.iterdir() if p.is_file()}


# --- the tail ---


def steps_of(tail: Tail[StepRecord]) -> tuple[list[int], bool]:
    records, cut = tail.new_lines()
    return [one.step for one in records], cut


def test_a_tail_gives_each_whole_line_once(folder: RunFolder) -> None:
    tail = Tail(folder.metrics_file, StepRecord)
    assert steps_of(tail) == ([], False)  # no file yet
    folder.append_metrics(record(1))
    folder.append_metrics(record(2))
    assert steps_of(tail) == ([1, 2], False)
    assert steps_of(tail) == ([], False)
    line = record(3).model_dump_json() + "\n"
    for part in (line[:10], line[10:-1]):
        with folder.metrics_file.open("a") as handle:
            handle.write(part)
        assert steps_of(tail) == ([], False)
    with folder.metrics_file.open("a") as handle:
        handle.write("\n" + line[:10])
    assert steps_of(tail) == ([3], False)


def test_a_tail_notices_a_resume_whatever_the_new_length(folder: RunFolder) -> None:
    """Shorter, as long, longer than before: the line at the old place is another one."""
    for again in (0, 2, 5):
        tail = Tail(folder.metrics_file, StepRecord)
        folder.metrics_file.unlink(missing_ok=True)
        for step in (1, 2, 3, 4):
            folder.append_metrics(record(step))
        assert steps_of(tail) == ([1, 2, 3, 4], False)
        folder.drop_metrics_after(2)
        for step in range(3, 3 + again):
            folder.append_metrics(record(step, loss=9.0))
        assert steps_of(tail) == (list(range(1, 3 + again)), True)
        assert steps_of(tail) == ([], False)


def test_a_tail_of_a_file_that_is_emptied_or_gone(folder: RunFolder) -> None:
    tail = Tail(folder.metrics_file, StepRecord)
    folder.append_metrics(record(1))
    assert steps_of(tail) == ([1], False)
    folder.drop_metrics_after(0)
    assert steps_of(tail) == ([], True)
    folder.append_metrics(record(1))
    assert steps_of(tail) == ([1], False)
    folder.metrics_file.unlink()
    assert steps_of(tail) == ([], True)
    assert steps_of(tail) == ([], False)


def test_a_tail_skips_what_a_power_cut_left(folder: RunFolder) -> None:
    tail = Tail(folder.metrics_file, StepRecord)
    folder.append_metrics(record(1))
    with folder.metrics_file.open("ab") as handle:
        handle.write(b'{"step": 2, "lo\0\0\xff\n')
    folder.append_metrics(record(3))
    assert steps_of(tail) == ([1, 3], False)


# --- the states of a run ---


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        watch(tmp_path / "nothing", plain())


def test_a_run_that_has_not_begun_is_waited_for(folder: RunFolder) -> None:
    with folder.lock():
        lines = follow(folder, lambda: None, lambda: folder.append_metrics(record(1)))
    assert lines[0] == f"watching {folder.path}"
    assert lines[1] == f"Running (process {os.getpid()}), no step done yet."
    assert [line.split("  ")[0] for line in lines[2:]] == ["step 1/60"]


def test_a_running_run_shows_its_newest_step_then_each_new_one(folder: RunFolder) -> None:
    for step in range(1, 31):
        folder.append_metrics(record(step))
    for number in range(9):
        folder.append_event(Event.now("machine", f"text {number}", 3))
    with folder.lock():
        lines = follow(
            folder,
            lambda: folder.append_metrics(record(31, held_out_loss=1.5)),
            lambda: folder.append_event(Event.now("machine", "Close the other program.", 31)),
        )
    text = "\n".join(lines)
    assert [int(n) for n in re.findall(r"step (\d+)/60  loss", text)] == [30, 31]
    assert re.findall(r"text (\d)", text) == ["4", "5", "6", "7", "8"]
    assert f"Running (process {os.getpid()}), 30 of 60 steps done." in lines
    assert "step 31/60  held-out loss 1.5000" in lines
    assert re.fullmatch(r"\d\d:\d\d Close the other program\.", lines[-1])


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "removed"])
def test_a_run_that_vanishes_ends_the_watching(moved: bool, folder: RunFolder) -> None:
    folder.append_metrics(record(1))
    console, there = plain(), folder.path

    def vanish(_: float) -> None:
        assert there.exists(), "it is still waited for"
        there.rename(there.with_name("elsewhere")) if moved else shutil.rmtree(there)

    with pytest.raises(ConfigError, match="is gone: it was moved or removed") as caught:
        watch(there, console, pause=vanish)
    assert caught.value.exit_code == 2
    assert "resumed" not in written(console)


def test_a_killed_run_is_said_once_and_its_resume_is_followed(folder: RunFolder) -> None:
    for step in (1, 2, 3, 4):
        folder.append_metrics(record(step))
    with held(folder) as first:

        def kill() -> None:
            first.kill()
            first.wait()

        def resume() -> None:
            folder.drop_metrics_after(2)
            folder.append_metrics(record(3, loss=9.0))

        lines = follow(folder, lambda: None, kill, lambda: None, lambda: None, resume)
    told = f"Not running, 4 of 60 steps done. Continue with: lowvram resume '{folder.path}'"
    assert lines.count(told) == 1
    back = lines.index("The run was resumed: its newest step is now 3.")
    assert lines[back + 1].startswith("step 3/60  loss 9.0000")


def test_a_finished_run_shows_its_result_and_ends(folder: RunFolder) -> None:
    folder.append_metrics(record(60))

    def never() -> None:
        raise AssertionError("it waits")

    finish(folder)
    text = "\n".join(follow(folder, never, console=Console(file=io.StringIO(), width=120, _environ={})))
    assert "step 60/60" in text
    assert "2.0000 before, 1.0000 after" in text
    assert "lowvram merge" in text


def test_a_run_that_finishes_while_it_is_watched(folder: RunFolder) -> None:
    with folder.lock():
        lines = follow(
            folder, lambda: folder.append_metrics(record(60)), lambda: finish(folder), lambda: None
        )
    assert any("2.0000 before" in line for line in lines)
    assert not any("Not running" in line for line in lines)


def test_a_run_that_still_writes_its_receipt_is_waited_for(folder: RunFolder) -> None:
    with folder.lock():
        finish(folder)
        receipt = folder.receipt_file.read_text()
        folder.receipt_file.unlink()
        shown = follow(folder, lambda: None)
        assert not any("2.0000 before" in line for line in shown)
        shown = follow(folder, lambda: folder.receipt_file.write_text(receipt))
        assert any("2.0000 before" in line for line in shown)


@pytest.mark.parametrize("width", [40, 120])
def test_once_draws_the_panel_and_ends(folder: RunFolder, width: int) -> None:
    sample = MachineSample(gpu_temperature_celsius=71, gpu_others_bytes=GiB, host_available_bytes=9 * GiB)
    for step in range(1, 13):
        folder.append_metrics(record(step, loss=13.0 - step, machine=sample))

    def never(_: float) -> None:
        raise AssertionError("it waits")

    console = terminal(width=width)
    watch(folder.path, console, once=True, pause=never)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written(console))
    assert "step 12/60" in text
    assert "█▇▇▆▅▅▄▄▃▂▂▁" in "".join(text.split("\n")) or width < 60
    assert "71 °C" in text
    assert "Not running" in text
    assert written(console).endswith("\x1b[?25h")


def test_the_panel_of_a_resumed_run_forgets_the_steps_that_are_gone(folder: RunFolder) -> None:
    for step in range(1, 9):
        folder.append_metrics(record(step, loss=100.0 if step > 4 else 1.0))
    console = terminal()
    follow(folder, lambda: folder.drop_metrics_after(4), console=console)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written(console))
    last = text.rpartition("watching")[2]
    assert "step 4/60" in last
    assert "1.0000  ▁▁▁▁ " in last  # ▁▁▁▁████ had the steps been kept


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are another matter there")
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", LOCK])
def test_a_run_of_somebody_else_is_refused_without_a_traceback(name: str) -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as parent:  # pytest's own folders are closed to others
        os.chmod(parent, 0o755)
        folder = RunFolder(Path(parent) / "run")
        folder.path.mkdir()
        for file in ("plan.yaml", name):
            (folder.path / file).write_text("")
        (folder.path / name).chmod(0)
        os.seteuid(user or 65534)
        try:
            with pytest.raises(ConfigError, match=rf"cannot be read: Permission denied: .*{name}"):
                watch(folder.path, plain(), once=True)
        finally:
            os.seteuid(user)


# --- it only reads ---


@pytest.mark.skipif(sys.platform == "win32", reason="directory permissions")
def test_nothing_is_written_and_no_lock_is_left(folder: RunFolder) -> None:
    folder.append_metrics(record(1))
    with folder.lock():
        pass
    before = snapshot(folder)
    folder.path.chmod(0o555)
    try:
        follow(folder, lambda: None, lambda: None)
    finally:
        folder.path.chmod(0o755)
    assert snapshot(folder) == before
    with folder.lock():
        assert folder.holder() == str(os.getpid())


def test_a_run_without_a_lock_file_gets_none(folder: RunFolder) -> None:
    follow(folder, lambda: None)
    assert not (folder.path / LOCK).exists()
    assert folder.holder() is None


def test_looks_at_the_lock_refuse_no_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at the very moment when a run begins: the run tries again, and has it."""
    with folder.lock():
        pass
    with (folder.path / LOCK).open() as looking:
        file_lock._take(looking, shared=True)
        pauses: list[float] = []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            file_lock.unlock(looking)

        monkeypatch.setattr(time, "sleep", pause)
        with folder.lock():
            assert len(pauses) == 1


def test_many_looks_beside_a_run_that_takes_the_lock_again_and_again(folder: RunFolder) -> None:
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            folder.holder()

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            with folder.lock():
                assert (folder.path / LOCK).read_text() == str(os.getpid())
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# --- the table ---


def table_of(phases: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(phases_table(_receipt(phases=phases)))
    return written(console)


def test_a_gpu_s_phases_stand_beside_their_prediction() -> None:
    load = {"predicted_allocated_bytes": 100 * MiB, "measured_allocated_bytes": 102 * MiB}
    forward = {"measured_reserved_bytes": 2 * GiB, "measured_driver_bytes": 3 * GiB}
    text = table_of({"load": load, "forward": forward, "other": {"measured_allocated_bytes": GiB}})
    assert "resident" not in text
    heading, *rows = text.splitlines()[1:]
    assert heading.split("  ")[0].strip() in ("", "phase")
    assert [row.split() for row in rows] == [
        ["load", "100", "MiB", "102", "MiB", "-", "-"],
        ["forward", "-", "-", "2.00", "GiB", "3.00", "GiB"],
    ]


def test_a_cpu_s_phases_are_those_of_the_process() -> None:
    text = table_of({"backward": {"predicted_allocated_bytes": GiB, "measured_resident_bytes": 2 * GiB}})
    assert "process measured" in text
    assert "reserved" not in text


def test_no_receipt_is_no_table(tmp_path: Path) -> None:
    console = plain()
    show_phases(tmp_path / "receipt.json", console)
    (tmp_path / "receipt.json").write_text("{")
    show_phases(tmp_path / "receipt.json", console)
    assert written(console) == ""


# --- a real run ---


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_real_run_is_watched_through_a_kill_and_a_resume(
    home: Path,
    tmp_path: Path,
) -> None:
    """Killed after a few steps, said; resumed, followed to its result."""
    path = tmp_path / "run"
    given = ("auto", "--model", home / "tiny", "--data", home / "rows.jsonl", *SHORT, "-o", path)
    steps = [*map(str, given), "--steps", "100"]
    trains = subprocess.Popen([sys.executable, "-c", MAIN, *steps], stdout=subprocess.DEVNULL)
    while not (path / "metrics.jsonl").is_file():
        time.sleep(0.05)
        assert trains.poll() is None
    trains.send_signal(signal.SIGSTOP)  # however busy the machine is, it is killed before its last step
    processes, console, killed = [trains], plain(), False

    def pause(_: float) -> None:
        nonlocal killed
        time.sleep(0.05)
        if not killed and re.search(r"step \d+/100", written(console)):
            trains.send_signal(signal.SIGKILL)
            trains.wait()
            killed = True
        if killed and len(processes) == 1 and "Not running" in written(console):
            again = [sys.executable, "-c", MAIN, "resume", str(path)]
            processes.append(subprocess.Popen(again, stdout=subprocess.DEVNULL))
        assert processes[-1].poll() in (None, 0, -signal.SIGKILL)

    watch(path, console, pause=pause)
    text = written(console)
    assert processes[-1].wait(60) == 0
    assert text.count("Not running") == 1
    assert text.count("Running (process") == 2
    assert "step 100/100" in text
    assert "memory by phase" in text
    assert not [name for name in os.listdir(path) if name.endswith(".tmp")]
