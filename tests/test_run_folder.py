"""The run folder: refusals with their remedies, the lock between processes, metrics after a crash."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowvram.errors import ConfigError, DoesNotFitError
from lowvram.training import run_folder
from lowvram.training.events import Event
from lowvram.training.metrics import StepRecord
from lowvram.training.run_folder import RunFolder, default_path, require_disk
from lowvram.units import GiB


def record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "total_steps": 60,
        "epoch": step / 30,
        "loss": 1 / step,
        "learning_rate": 1.8e-4,
        "grad_norm": 0.5,
        "trained_tokens": 300,
        "tokens": 800,
        "seconds": 1.25,
        "tokens_per_second": 640.0,
        "eta_seconds": 60.0,
        "memory_now_bytes": 1,
        "memory_peak_bytes": 2,
        "memory_predicted_bytes": 3,
        "memory_budget_bytes": 4,
    }
    return StepRecord(**{**values, **changes})


def refusal(action: Any, *args: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        action(*args)
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    return caught.value


# Creating and opening


def test_the_parts_have_the_names_of_the_design(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    parts = [run.plan_file, run.metrics_file, run.receipt_file, run.result_file, run.report_file]
    names = [path.relative_to(tmp_path).as_posix() for path in [*parts, run.checkpoints, run.adapter]]
    assert names == [
        "plan.yaml",
        "metrics.jsonl",
        "receipt.json",
        "result.json",
        "report.html",
        "checkpoints",
        "adapter",
    ]


def test_a_new_folder_is_made_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "a" / "b")
    assert list(run.path.iterdir()) == []
    RunFolder.create(run.path)  # an empty one will do


@pytest.mark.parametrize("part", ["plan.yaml", "checkpoints", "adapter"])
def test_a_folder_with_a_run_is_refused_and_can_be_opened(part: str, tmp_path: Path) -> None:
    (tmp_path / part).mkdir()
    for refuse in (RunFolder.create, RunFolder.refuse_used):
        error = refusal(refuse, tmp_path)
        assert "already holds a run" in error.message
        assert error.remedy == f"lowvram resume {tmp_path}, or give another --output"
    assert RunFolder.open(tmp_path).path == tmp_path


def test_foreign_files_are_refused_and_named(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"thesis{number}.tex").touch()
    error = refusal(RunFolder.create, tmp_path)
    assert "thesis0.tex" in error.message
    assert "and 2 more" in error.message
    assert len(list(tmp_path.iterdir())) == 7


def test_the_lock_of_a_run_that_never_began_is_no_foreign_file(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    with run.lock():
        pass
    assert [path.name for path in run.path.iterdir()] == [".lock"]
    RunFolder.create(run.path)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in refusal(RunFolder.create, tmp_path / "file").message
    assert "cannot be written to" in refusal(RunFolder.create, tmp_path / "file" / "run").message


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EROFS, "read-only"), (errno.EACCES, "read-only"), (errno.ENOSPC, "No space left")],
)
def test_a_folder_that_takes_no_file_is_refused(
    number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert said in refusal(RunFolder.create, tmp_path / "run").message


def test_a_read_only_parent_is_refused(locked: Path) -> None:
    for path in (locked / "run", locked.parent / "run"):
        assert "read-only" in refusal(RunFolder.create, path).message


def test_opening_says_what_is_there_instead(tmp_path: Path) -> None:
    assert "no such folder" in refusal(RunFolder.open, tmp_path / "missing").message
    (tmp_path / "notes.txt").touch()
    assert "notes.txt" in refusal(RunFolder.open, tmp_path).message
    assert "it is a file" in refusal(RunFolder.open, tmp_path / "notes.txt").message
    (tmp_path / "empty").mkdir()
    assert "it is empty" in refusal(RunFolder.open, tmp_path / "empty").message


def test_opening_names_the_runs_nearby(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "smol"
    (run / "adapter").mkdir(parents=True)
    for wrong in (tmp_path / "runs", tmp_path / "runs" / "smoll", run / "adapter"):
        assert refusal(RunFolder.open, wrong).remedy.endswith(str(run))


# The lock

HOLDER = """
import sys
import tempfile
from pathlib import Path
from lowvram.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


def start_holder(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(run_folder.__file__).parents[2])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    return holder


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_a_second_process_is_refused_until_the_first_ends(end: str, tmp_path: Path) -> None:
    with start_holder(tmp_path) as holder:
        error = refusal(RunFolder(tmp_path).lock().__enter__)
        assert error.message == f"another lowvram process (pid {holder.pid}) is training in {tmp_path}."
        if end == "kill":
            holder.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    with RunFolder(tmp_path).lock():  # the file is still there; the lock is not
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_the_same_process_is_refused_twice_and_an_error_lets_go(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with contextlib.suppress(KeyError), run.lock():
        assert f"pid {os.getpid()}" in refusal(run.lock().__enter__).message
        raise KeyError
    with run.lock():
        pass


def test_a_lock_in_a_missing_folder_is_a_clear_refusal(tmp_path: Path) -> None:
    assert "No such file" in refusal(RunFolder(tmp_path / "missing").lock().__enter__).message


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder, "lock", refuse)
    error = refusal(RunFolder(tmp_path).lock().__enter__)
    assert "No locks available" in error.message
    assert "local disk" in error.remedy


# Metrics


def test_metrics_come_back_as_they_were(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_metrics() == []
    records = [record(1), record(2, held_out_loss=0.7)]
    for number, item in enumerate(records, start=1):
        run.append_metrics(item)
        assert run.metrics_file.read_bytes().count(b"\n") == number  # on disk before the next step
    assert run.read_metrics() == records


def test_numbers_that_json_lacks_stay_json_and_come_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_metrics(record(1, loss=math.nan, grad_norm=math.inf, eta_seconds=-math.inf))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(run.metrics_file.read_text(), parse_constant=refuse)
    (read,) = run.read_metrics()
    assert math.isnan(read.loss)
    assert (read.grad_norm, read.eta_seconds) == (math.inf, -math.inf)


@pytest.mark.parametrize("torn", [b'{"step": 5, "loss"', b"\0\0\0\xff\xfe", b""])
def test_resuming_drops_later_steps_and_a_torn_line(torn: bytes, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (1, 2, 3, 4):
        run.append_metrics(record(step))
    with run.metrics_file.open("ab") as handle:
        handle.write(torn)
    assert [item.step for item in run.read_metrics()] == [1, 2, 3, 4]
    run.drop_metrics_after(2)
    run.append_metrics(record(3, loss=9.0))
    assert run.read_metrics() == [record(1), record(2), record(3, loss=9.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_event_after_a_torn_one_is_read(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    events = [Event.now("proof", "one", 0), Event.now("resume", "two", 3)]
    run.append_event(events[0])
    with run.events_file.open("ab") as handle:
        handle.write(b'{"at": "2026')
    run.append_event(events[1])
    assert run.read_events() == events


def test_dropping_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.append_metrics(record(1))
    run.append_metrics(record(2))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        run.drop_metrics_after(1)
    assert len(run.read_metrics()) == 2


def test_nothing_to_drop_makes_no_file(tmp_path: Path) -> None:
    RunFolder(tmp_path).drop_metrics_after(0)
    assert list(tmp_path.iterdir()) == []


def test_damage_in_the_middle_is_named_with_its_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_metrics(record(1))
    with run.metrics_file.open("a") as handle:
        handle.write("{}\n")
    run.append_metrics(record(2))
    assert f"{run.metrics_file}:2" in refusal(run.read_metrics).message
    run.drop_metrics_after(2)  # a resume heals it
    assert run.read_metrics() == [record(1), record(2)]


# Names and disk


@pytest.mark.parametrize(
    ("model", "data", "name"),
    [
        ("Qwen/Qwen2.5-0.5B", "data/train.jsonl", "Qwen2.5-0.5B-train"),
        ("/models/my llama/", "train.jsonl.gz", "my-llama-train"),
        ("C:\\models\\phi", "C:\\data\\chat.JSON", "phi-chat"),
        ("smol", "org/squad-v1.1", "smol-squad-v1.1"),
        ("/", "..jsonl", "model-jsonl"),
    ],
)
def test_default_names(model: str, data: str, name: str, tmp_path: Path) -> None:
    assert default_path(tmp_path, model, data) == tmp_path / name


def test_the_current_folder_gives_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert default_path(Path("runs"), ".", "d.jsonl") == Path("runs/mine-d")


def test_a_default_path_never_exists(tmp_path: Path) -> None:
    got = []
    for make in (Path.mkdir, Path.touch, Path.mkdir):
        got.append(default_path(tmp_path, "m", "d"))
        make(got[-1])
    (tmp_path / "m-d-4").symlink_to(tmp_path / "nowhere")
    got.append(default_path(tmp_path, "m", "d"))
    assert [path.name for path in got] == ["m-d", "m-d-2", "m-d-3", "m-d-5"]


def test_too_little_disk_is_said_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return SimpleNamespace(total=100 * GiB, used=97 * GiB, free=3 * GiB)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    folder = tmp_path / "not" / "yet"
    require_disk(folder, 3 * GiB)
    with pytest.raises(DoesNotFitError, match=r"needs 4\.00 GiB of disk, .* 3\.00 GiB free") as caught:
        require_disk(folder, 4 * GiB)
    assert caught.value.exit_code == 3
    assert asked == [tmp_path, tmp_path]  # the part of the path that exists
