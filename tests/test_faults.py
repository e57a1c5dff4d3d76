"""Faults that hit a run through the real command line: what is said, what is safe, and how it goes on."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowvram.errors import ConfigError, DeviceLostError, LowvramError
from lowvram.planner.plan import Plan
from lowvram.training import checkpoint
from lowvram.training.failures import told_as_ours
from lowvram.training.run_folder import RunFolder
from tests.fault_run import adapter_bytes, learned, save_plan, saved_step
from tests.forked_cli import Command, Ended, ForkedCli

STEPS, SAVE_EVERY = 12, 3


@pytest.fixture(scope="module")
def plan(forked_cli: ForkedCli, fault_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "plan.yaml"
    changes = {"total_steps": STEPS, "save_every": SAVE_EVERY, "evaluate_every": 2 * SAVE_EVERY}
    return save_plan(forked_cli, fault_home, file, **changes)


@pytest.fixture(scope="module")
def whole(forked_cli: ForkedCli, plan: Path) -> Path:
    """The run that nothing happened to."""
    run = plan.parent / "whole"
    ended = forked_cli.run("train", plan, "-o", run)
    assert ended.code == 0, ended.err
    return run


@pytest.fixture(scope="module")
def halted(forked_cli: ForkedCli, plan: Path) -> Path:
    """A run that was stopped in step 7: checkpoints of steps 6 and 7."""
    run = plan.parent / "halted"
    ended = forked_cli.run("train", plan, "-o", run, fault="interrupted", number=7)
    assert ended.code == 130, ended.err
    return run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 80 MB, of which a run asks for 64 before it begins."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount; files_stay_small fills no disk and says the same")
    yield folder
    subprocess.run(["umount", folder], check=True)


def _two_steps_of(cli: ForkedCli, plan: Path, run: Path, step_seconds: float) -> Command:
    """A training that goes on, slowly enough for something to happen to it."""
    command = cli.start("train", plan, "-o", run, fault="slow_steps", seconds=step_seconds)
    command.until(lambda: run.is_dir() and len(RunFolder(run).read_metrics()) >= 2)
    return command


def _same(run: Path, whole: Path) -> bool:
    """To the last bit: every step's figures, and the adapter."""
    return learned(run) == learned(whole) and adapter_bytes(run) == adapter_bytes(whole)


def _is_safe(ended: Ended, run: Path, step: int) -> bool:
    """The message names the checkpoint that is there, and the remedy how to go on."""
    told = f"The checkpoint of step {step} is whole: a resume goes on from there." in ended.err
    return told and saved_step(run) == step and f"lowvram resume {run}" in ended.err


def _resumes(cli: ForkedCli, run: Path, whole: Path) -> bool:
    ended = cli.run("resume", run)
    assert ended.code == 0, ended.err
    return _same(run, whole)


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_finish_and_be_saved(
    number: int, code: int, forked_cli: ForkedCli, plan: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = _two_steps_of(forked_cli, plan, run, step_seconds=0.5)
    command.send(number)
    ended = command.ended()
    done = len(learned(run))
    assert ended.code == code
    assert "Stopping: finishing this step and saving." in ended.out
    assert f"Stopped: Stopped after step {done} of {STEPS}; everything is saved." in ended.err
    assert f"lowvram resume {run}" in ended.err
    assert 2 <= done == saved_step(run) < STEPS
    assert _resumes(forked_cli, run, whole)


def test_the_second_ctrl_c_ends_at_once_and_loses_the_step(
    forked_cli: ForkedCli, plan: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    forked_cli.run("train", plan, "-o", run, fault="interrupted", number=4)
    command = forked_cli.start("resume", run, fault="slow_steps", seconds=60)
    command.until(lambda: "a step begins" in command.said)
    command.send(signal.SIGINT)
    command.until(lambda: "Stopping:" in command.said)
    command.send(signal.SIGINT)
    ended = command.ended()
    assert ended.code == 130
    assert "Stopped at once." in ended.err
    assert _is_safe(ended, run, 4)
    assert _resumes(forked_cli, run, whole)


# A full disk


FULL: dict[str, dict[str, Any]] = {
    "while metrics are written": {"moment": "metrics", "number": 5, "safe": 3},
    "while a checkpoint is saved": {"moment": "save", "number": 3, "safe": 6},
    "while the adapter is exported": {"moment": "adapter", "number": 1, "safe": STEPS},
    "while the receipt is written": {"moment": "receipt", "number": 1, "safe": STEPS},
}


@pytest.mark.parametrize("when", FULL)
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(
    when: str, forked_cli: ForkedCli, plan: Path, whole: Path, disk: Path
) -> None:
    fault, filler = dict(FULL[when]), disk / "of another program"
    safe = fault.pop("safe")
    run = disk / "run"
    ended = forked_cli.run("train", plan, "-o", run, fault="disk_fills", file=str(filler), **fault)
    assert (ended.code, "What to do: Free " in ended.err) == (3, True), ended.err
    assert "No space left on device" in ended.err or "The disk is full" in ended.err
    if when == "while metrics are written":  # the file's last page may take some lines more
        safe = saved_step(run)
    assert _is_safe(ended, run, safe), ended.err
    assert not (run / ".adapter.tmp").exists()
    assert not (run / "result.json").exists()
    filler.unlink()
    assert _resumes(forked_cli, run, whole)


@pytest.mark.parametrize("when", ["while a checkpoint is saved", "while the adapter is exported"])
def test_a_file_that_may_not_grow_ends_the_run_in_the_same_way(
    when: str, forked_cli: ForkedCli, plan: Path, whole: Path, tmp_path: Path
) -> None:
    fault, run = dict(FULL[when]), tmp_path / "run"
    safe = fault.pop("safe")
    ended = forked_cli.run("train", plan, "-o", run, fault="files_stay_small", n_bytes=9000, **fault)
    assert (ended.code, "What to do: Free " in ended.err) == (3, True), ended.err
    assert _is_safe(ended, run, safe), ended.err
    assert _resumes(forked_cli, run, whole)


def test_a_full_disk_while_merging_leaves_nothing_and_harms_nothing(
    forked_cli: ForkedCli, whole: Path, disk: Path
) -> None:
    filler, merged, before = disk / "filler", disk / "merged", adapter_bytes(whole)
    args = ("merge", whole, "-o", merged)
    ended = forked_cli.run(*args, fault="disk_fills", moment="merge", number=1, file=str(filler))
    assert (ended.code, "nothing was written: No space left" in ended.err) == (3, True), ended.err
    assert "Free some room, or give an --output on another disk." in ended.err
    assert [path.name for path in disk.iterdir()] == ["filler"]
    filler.unlink()
    ended = forked_cli.run(*args)
    assert ended.code == 0, ended.err
    assert adapter_bytes(whole) == before
    assert AutoModelForCausalLM.from_pretrained(merged).config.num_hidden_layers == 2


# Damaged checkpoints


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a bit flipped": (_flip_a_bit, checkpoint.TENSORS, "optimizer.safetensors has a wrong hash"),
    "cut off": (_cut, checkpoint.ADAPTER, "adapter.safetensors has "),
    "deleted": (Path.unlink, checkpoint.STATE, "state.json is missing"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_resume_passes_over_a_damaged_checkpoint_and_says_so(
    how: str, forked_cli: ForkedCli, halted: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(halted, run)
    harm, name, says = DAMAGE[how]
    harm(run / "checkpoints" / "step-000007" / name)
    ended = forked_cli.run("resume", run)
    assert ended.code == 0, ended.err
    assert f"step-000007 is damaged: {says}" in ended.out
    assert f"Continuing after step 6 of {STEPS}" in ended.out
    assert (run / "checkpoints" / "step-000007.unread").is_dir()
    assert "it is kept with the ending .unread" in ended.out
    assert [event.text for event in RunFolder(run).read_events() if "is damaged" in event.text]
    assert _same(run, whole)


def _of_another_format(manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2, "more": 3'))


UNUSABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (_cut, "is damaged: manifest.json holds something else"),
    "removed": (Path.unlink, "is damaged: manifest.json is missing"),
    "another format": (_of_another_format, "is of format 2, this lowvram reads format 1"),
}


@pytest.mark.parametrize("how", UNUSABLE)
def test_without_a_usable_checkpoint_only_force_begins_again(
    how: str, forked_cli: ForkedCli, halted: Path, whole: Path, tmp_path: Path
) -> None:
    """Refused with every reason and nothing touched; with --force what could not be used stays on disk."""
    run = tmp_path / "run"
    shutil.copytree(halted, run)
    harm, says = UNUSABLE[how]
    for step in (6, 7):
        harm(run / "checkpoints" / f"step-{step:06d}" / checkpoint.MANIFEST)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    ended = forked_cli.run("resume", run)
    assert (ended.code, "cannot go on after step 7" in ended.err) == (2, True), ended.err
    assert f"step-000007 {says} step-000006 {says}" in ended.err
    assert f"lowvram resume {run} --force" in ended.err
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    ended = forked_cli.run("resume", run, "--force")
    assert ended.code == 0, ended.err
    assert f"Beginning again, as --force allows: 7 of {STEPS} steps are lost" in ended.out
    assert _same(run, whole)
    kept = {f"step-{step:06d}.unread" for step in (6, 7)}
    assert kept <= {path.name for path in (run / "checkpoints").iterdir()}


def test_checkpoints_that_may_not_be_read_are_not_called_damaged(
    forked_cli: ForkedCli, halted: Path, plan: Path, fault_home: Path, public: Path
) -> None:
    _open_to_all(plan, fault_home, public)
    run = public / "run"
    shutil.copytree(halted, run)
    for path in (run, *run.rglob("*")):
        path.chmod(0o777)
    for file in (run / "checkpoints").glob(f"*/{checkpoint.ADAPTER}"):
        file.chmod(0)
    ended = forked_cli.run("resume", run, fault="as_nobody")
    assert ended.code == 2, ended.err
    says = "cannot be read: adapter.safetensors: Permission denied"
    assert f"step-000007 {says} step-000006 {says}" in ended.err
    assert "damaged" not in ended.err


# A folder that cannot be written


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may write; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def _open_to_all(plan: Path, home: Path, folder: Path) -> Path:
    """Plan, model and data where any user may read them."""
    shutil.copytree(home, folder / "home")
    text = plan.read_text(encoding="utf-8").replace(str(home), str(folder / "home"))
    (folder / "plan.yaml").write_text(text, encoding="utf-8")
    for path in (folder / "home").rglob("*"):
        path.chmod(0o755)
    (folder / "home").chmod(0o755)
    return folder / "plan.yaml"


def test_an_output_that_is_read_only_is_refused_before_training(
    forked_cli: ForkedCli, plan: Path, fault_home: Path, public: Path
) -> None:
    copied, locked = _open_to_all(plan, fault_home, public), public / "locked"
    locked.mkdir(mode=0o555)
    ended = forked_cli.run("train", copied, "-o", locked / "run", fault="as_nobody")
    assert (ended.code, "read-only" in ended.err, "--output" in ended.err) == (2, True, True), ended.err
    assert "step 1/" not in ended.out
    assert list(locked.iterdir()) == []


def test_a_folder_that_becomes_read_only_ends_the_run_and_loses_nothing_saved(
    forked_cli: ForkedCli, plan: Path, fault_home: Path, whole: Path, public: Path
) -> None:
    copied, run = _open_to_all(plan, fault_home, public), public / "run"
    checkpoints = run / "checkpoints"
    fault = {"fault": "as_nobody", "moment": "save", "number": 3, "folder": str(checkpoints)}
    ended = forked_cli.run("train", copied, "-o", run, **fault)
    assert (ended.code, "it is read-only for you" in ended.err) == (2, True), ended.err
    assert _is_safe(ended, run, 6)
    run.chmod(0o555)
    ended = forked_cli.run("resume", run, fault="as_nobody")
    assert (ended.code, "read-only" in ended.err) == (2, True), ended.err
    run.chmod(0o755)
    checkpoints.chmod(0o755)
    ended = forked_cli.run("resume", run, fault="as_nobody")
    assert ended.code == 0, ended.err
    assert [step[3:] for step in learned(run)] == [step[3:] for step in learned(whole)]


# Numbers that are none


@pytest.mark.parametrize(
    ("at", "value", "says", "safe"),
    [
        (4, math.inf, "Step 5: the loss is", 3),
        (6, math.nan, "Step 6: the held-out loss is nan", 3),
        (9, math.nan, "Step 9: base_model.model", 6),
        (9, math.inf, "is no longer finite", 6),
    ],
)
def test_a_poisoned_weight_stops_the_run_before_it_is_saved(
    at: int,
    value: float,
    says: str,
    safe: int,
    forked_cli: ForkedCli,
    plan: Path,
    whole: Path,
    tmp_path: Path,
) -> None:
    """Seen in the next step's loss, in the held-out loss, and before step 9 is saved."""
    run = tmp_path / "run"
    ended = forked_cli.run("train", plan, "-o", run, fault="poisoned", number=at, value=value)
    assert (ended.code, says in ended.err, "training stopped" in ended.err) == (2, True, True), ended.err
    assert f"The checkpoint of step {safe} is whole" in ended.err
    assert saved_step(run) == safe
    assert not (run / "adapter").exists()
    assert _resumes(forked_cli, run, whole)


def test_a_learning_rate_beyond_all_sense_stops_and_says_so(
    forked_cli: ForkedCli, fault_home: Path, tmp_path: Path
) -> None:
    changes = {"learning_rate": 1e30, "schedule": "constant", "warmup_steps": 8}
    plan = save_plan(forked_cli, fault_home, tmp_path / "plan.yaml", **changes)
    text = plan.read_text().replace("evaluate_every: 5", "evaluate_every: 100")
    plan.write_text(text)
    run = tmp_path / "run"
    ended = forked_cli.run("train", plan, "-o", run)
    assert ended.code == 2
    assert "training stopped" in ended.err
    assert f"Set a smaller learning_rate than 1e+30 in {run}/plan.yaml" in ended.err
    assert f"lowvram resume {run} --force" in ended.err
    assert learned(run)
    assert all(math.isfinite(step[3]) for step in learned(run))
    assert not (run / "adapter").exists()
    lower = Plan.from_yaml(run / "plan.yaml").model_copy(update={"learning_rate": 1e-4})
    (run / "plan.yaml").write_text(lower.to_yaml())
    ended = forked_cli.run("resume", run, "--force")
    assert ended.code == 0, ended.err


def test_a_base_with_a_weight_that_is_no_number_is_refused_before_the_first_step(
    forked_cli: ForkedCli, plan: Path, fault_home: Path, tmp_path: Path
) -> None:
    shutil.copytree(fault_home, tmp_path / "home")
    file = tmp_path / "home" / "model" / "model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if "down_proj" in name)[0, 0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    text = plan.read_text().replace(f"{fault_home}/model", f"{tmp_path}/home/model")
    (tmp_path / "plan.yaml").write_text(text)
    ended = forked_cli.run("train", tmp_path / "plan.yaml", "-o", tmp_path / "run")
    assert (ended.code, "its weights are damaged" in ended.err) == (2, True), ended.err
    assert learned(tmp_path / "run") == []
    assert saved_step(tmp_path / "run") == 0


# Data that changes


def _on_a_copy(plan: Path, home: Path, folder: Path) -> tuple[Path, Path]:
    """The plan for a copy of the data, and that copy."""
    rows = folder / "rows.jsonl"
    shutil.copy(home / "rows.jsonl", rows)
    text = plan.read_text().replace(str(home / "rows.jsonl"), str(rows))
    (folder / "plan.yaml").write_text(text)
    return folder / "plan.yaml", rows


def test_data_that_vanishes_is_not_missed_until_the_run_is_resumed(
    forked_cli: ForkedCli, plan: Path, fault_home: Path, whole: Path, tmp_path: Path
) -> None:
    copied, rows = _on_a_copy(plan, fault_home, tmp_path)
    run, content = tmp_path / "run", rows.read_bytes()
    command = _two_steps_of(forked_cli, copied, run, step_seconds=0.3)
    rows.unlink()
    command.until(lambda: len(RunFolder(run).read_metrics()) >= 5)
    command.send(signal.SIGTERM)
    assert command.ended().code == 143
    ended = forked_cli.run("resume", run)
    assert (ended.code, str(rows) in ended.err) == (5, True), ended.err
    rows.write_bytes(content)
    ended = forked_cli.run("resume", run)
    assert ended.code == 0, ended.err
    assert [step[1:] for step in learned(run)] == [step[1:] for step in learned(whole)]


def test_data_that_changes_is_trained_as_it_was_and_refused_by_a_resume(
    forked_cli: ForkedCli, plan: Path, fault_home: Path, whole: Path, tmp_path: Path
) -> None:
    copied, rows = _on_a_copy(plan, fault_home, tmp_path)
    run, content = tmp_path / "run", rows.read_bytes()
    command = _two_steps_of(forked_cli, copied, run, step_seconds=0.1)
    rows.write_bytes(content.replace(b"What", b"Who_"))
    ended = command.ended()
    assert ended.code == 0, ended.err
    assert _same(run, whole)
    (run / "result.json").unlink()
    ended = forked_cli.run("resume", run)
    assert (ended.code, "data: " in ended.err, "(31 examples) ->" in ended.err) == (2, True, True), ended.err


# The clock


def test_a_clock_that_jumps_back_changes_nothing_but_the_dates(
    forked_cli: ForkedCli, plan: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = forked_cli.run("train", plan, "-o", run, fault="clock_jumps_back", number=4, days=400)
    assert ended.code == 0, ended.err
    assert _same(run, whole)
    for record in RunFolder(run).read_metrics():
        assert 0 < record.seconds < 60
        assert record.eta_seconds >= 0
        assert 0 < record.tokens_per_second < 1e9
    receipts = [json.loads((folder / "receipt.json").read_text()) for folder in (run, whole)]
    assert receipts[0]["finished_at"] < receipts[1]["finished_at"]  # the clock did jump
    assert json.loads((run / "result.json").read_text())["seconds"] > 0


# Two runs in one folder


def test_a_second_process_in_the_folder_is_refused(
    forked_cli: ForkedCli, halted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(halted, run)
    with RunFolder(run).lock():
        ended = forked_cli.run("resume", run)
    assert (ended.code, f"another lowvram process (pid {os.getpid()})" in ended.err) == (2, True), ended.err
    assert saved_step(run) == 7


# A lost device

LOST = "CUDA error: unspecified launch failure"


def test_a_lost_device_is_asked_nothing_more_and_the_run_goes_on_later(
    forked_cli: ForkedCli, plan: Path, whole: Path, tmp_path: Path
) -> None:
    """In step 5's backward: no save from its memory, no operator on it, exit code 6."""
    run, asked = tmp_path / "run", tmp_path / "asked"
    fault = {"fault": "device_lost", "number": 5, "message": f"{LOST}\nhint", "asked": str(asked)}
    ended = forked_cli.run("train", plan, "-o", run, **fault)
    assert ended.code == 6
    assert f"The device stopped answering while training: {LOST}. " in ended.err
    assert _is_safe(ended, run, 3)
    assert asked.read_text() == ""
    assert _resumes(forked_cli, run, whole)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: the launch timed out and was terminated",
        "CUDA error: uncorrectable ECC error encountered",
        "HIP error: unspecified launch failure",
        "CUDA error: unknown error",
        "CUDA error: no CUDA-capable device is detected",
        "level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)",
        "NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus.",
        "GPU is lost",
    ],
)
def test_what_drivers_say_of_a_lost_device(text: str, tmp_path: Path) -> None:
    error = _told(torch.AcceleratorError(text), tmp_path)
    assert isinstance(error, DeviceLostError)
    assert error.exit_code == 6
    assert "There is no checkpoint yet" in error.message


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.OutOfMemoryError("CUDA out of memory."),
        SafetensorError("Error while deserializing header"),
        ConnectionRefusedError(111, "Connection refused"),  # of a tracker
    ],
)
def test_a_bug_keeps_its_traceback(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)), told_as_ours(RunFolder(tmp_path)):
        raise error


def test_cleaning_up_after_a_lost_device_does_not_hide_it(tmp_path: Path) -> None:
    def cleaning_up() -> None:
        try:
            raise torch.AcceleratorError(LOST)
        finally:
            raise RuntimeError("CUDA error: operation not permitted")

    with (
        pytest.raises(DeviceLostError, match="unspecified launch failure"),
        told_as_ours(RunFolder(tmp_path)),
    ):
        cleaning_up()


def test_a_failing_disk_is_told_with_its_file(tmp_path: Path) -> None:
    error = _told(OSError(5, "Input/output error", str(tmp_path / "metrics.jsonl")), tmp_path)
    assert isinstance(error, ConfigError)
    assert f"{tmp_path / 'metrics.jsonl'} cannot be written: Input/output error." in error.message
    assert "Permission denied" not in error.message


def _told(error: Exception, folder: Path) -> LowvramError:
    with pytest.raises(LowvramError) as caught, told_as_ours(RunFolder(folder)):
        raise error
    return caught.value
