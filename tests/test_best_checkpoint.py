"""Rotation keeps the newest checkpoints and the best one, whenever a run is killed; their cost is told."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowvram.engine.adapter_start import adapter_state
from lowvram.training import checkpoint, loop
from lowvram.training.checkpoint import load, newest, save
from lowvram.training.run import Run
from tests import tiny_runs
from tests.test_checkpoint import flip_a_bit, names, state_of
from tests.tiny_runs import (
    ASKED,
    Cli,
    edit_plan,
    events,
    killed_after,
    learned,
    metrics,
    result,
    steps_kept,
    write_rows,
)

byte_model, command = tiny_runs.byte_model, tiny_runs.command
pytestmark = pytest.mark.usefixtures("one_thread")
BEST = 3  # of 8 steps whose held-out losses are 5.56, 5.66, 5.46, 5.58, 5.62, 5.58 ...


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    for step, best in ((10, 10), (20, 10), (30, 10), (40, 10)):
        save(tmp_path, state_of(step), keep=2, best_step=best)
    assert names(tmp_path) == ["step-000010", "step-000030", "step-000040"]
    save(tmp_path, state_of(50), keep=2, best_step=50)
    assert names(tmp_path) == ["step-000040", "step-000050"]
    save(tmp_path, state_of(60), keep=3, best_step=40)
    assert names(tmp_path) == ["step-000040", "step-000050", "step-000060"]


def test_a_best_one_that_was_set_aside_stays_and_is_found(tmp_path: Path) -> None:
    save(tmp_path, state_of(5)).rename(tmp_path / ".step-000005.old")  # killed between two renames
    save(tmp_path, state_of(6), keep=1, best_step=5)
    save(tmp_path, state_of(7), keep=1, best_step=5)
    path, problem = checkpoint.of_step(tmp_path, 5)
    assert path is not None
    assert (load(path).step, problem) == (5, "")
    assert newest(tmp_path)[0] == tmp_path / "step-000007"


def test_what_is_wrong_with_a_best_one_is_said(tmp_path: Path) -> None:
    flip_a_bit(save(tmp_path, state_of(5)) / checkpoint.ADAPTER)
    damaged = "The checkpoint of step 5 is damaged: adapter.safetensors has a wrong hash"
    assert checkpoint.of_step(tmp_path, 5) == (None, damaged)
    assert checkpoint.of_step(tmp_path, 6) == (None, "The checkpoint of step 6 is gone")


KILLS = """
import os, signal, sys
from pathlib import Path
import torch
from lowvram.training import checkpoint
from tests.test_checkpoint import state_of

torch.set_num_threads(1)  # a forked process has none of its parent's threads
folder = Path(sys.argv[1])
BEST = {1: 1, 2: 1, 3: 1, 4: 4}  # of each step, the best so far
NAMES = ("fsync", "rename", "mkdir", "unlink", "rmdir")


def save(step):
    state = state_of(step, extra={"best": BEST[step]})
    checkpoint.save(folder, state, keep=2, best_step=BEST[step])


def checked():
    '''The newest one's step; its own best one, and the newest but one, are there and whole.'''
    path, notes = checkpoint.newest(folder)
    assert not notes, notes
    if path is None:
        return 0
    state = checkpoint.load(path)
    best, problem = checkpoint.of_step(folder, state.extra["best"])
    assert best is not None, problem
    assert checkpoint.load(best).adapter["layers.0.lora_A"][0, 0] == state.extra["best"]
    if state.step > 1:
        assert checkpoint.of_step(folder, state.step - 1)[0] is not None
    return state.step


def killed_before_call(number, step):
    calls = [0]

    def counted(real):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call

    for name in NAMES:
        setattr(os, name, counted(getattr(os, name)))
    save(step)
    os._exit(0)


kills = 0
for step in BEST:
    for number in range(1, 200):
        pid = os.fork()
        if not pid:
            killed_before_call(number, step)
            os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert checked() in (step - 1, step), (step, number)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
    assert status == 0, step
assert sorted(path.name for path in folder.iterdir()) == ["step-000003", "step-000004"]
print(kills)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_kill_before_any_file_operation_leaves_the_best_one(tmp_path: Path) -> None:
    """Four saves, each killed before each of its operations and tried again."""
    folder = tmp_path / "run" / "checkpoints"
    command = [sys.executable, "-W", "ignore", "-c", KILLS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 4 * 8  # a save alone syncs, makes and renames as often


def overshooting(model: Path, folder: Path, command: Cli, *more: object, **values: object) -> Path:
    """A run whose held-out examples say what the training data never does: the loss rises after BEST."""
    data, held_out = write_rows(folder / "rows.jsonl", range(30)), folder / "eval.jsonl"
    rows = [{"question": f"{i} + 1?", "answer": "LOUD WORDS " * (1 + i % 3)} for i in range(6)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = folder / "plan.yaml"
    asked = ("--eval-data", held_out, "--precision", "fp32", "--dropout", "0.1", "--steps", "8", *ASKED)
    code, _, err = command("plan", "--model", model, "--data", data, *asked, *more, "-o", plan)
    assert code == 0, err
    edit_plan(plan, evaluate_every=1, **values)
    code, _, err = command("train", plan, "-o", folder / "run")
    assert code == 0, err
    return folder / "run"


def test_the_best_adapter_is_what_a_run_leaves(byte_model: Path, tmp_path: Path, command: Cli) -> None:
    """Of step 3 of 8: the tensors of its checkpoint, its loss, and it says so."""
    run = overshooting(byte_model, tmp_path, command, save_every=1)
    losses = [row["held_out_loss"] for row in metrics(run)]
    assert losses.index(min(losses)) + 1 == BEST, losses
    assert steps_kept(run) == [BEST, 7, 8]
    said = result(run)
    assert (said["adapter_step"], said["steps"], said["stop_reason"]) == (BEST, 8, "finished")
    assert said["held_out_loss_after"] == losses[BEST - 1]
    assert said["held_out_perplexity_after"] == math.exp(losses[BEST - 1])
    (told,) = events(run, "finish")
    best, last = f"{losses[BEST - 1]:.4f}", f"{losses[-1]:.4f}"
    assert (
        told == f"The adapter is the best one, of step 3: held-out loss {best}, against {last} after step 8"
    )
    assert _adapter(run) == _saved(run, BEST)
    assert _adapter(run) != _saved(run, 8)


def _adapter(run: Path) -> dict[str, list[Any]]:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def _saved(run: Path, step: int) -> dict[str, list[Any]]:
    tensors = load(run / "checkpoints" / f"step-{step:06d}").adapter
    return {name.replace(".default.", "."): tensor.tolist() for name, tensor in tensors.items()}


def test_the_best_one_survives_a_resume(byte_model: Path, tmp_path: Path, command: Cli) -> None:
    whole = overshooting(byte_model, tmp_path, command, save_every=1)
    resumed = killed_after(7, whole, tmp_path / "resumed")
    assert command("resume", resumed)[0] == 0
    assert learned(resumed) == learned(whole)
    assert _adapter(resumed) == _adapter(whole)
    timeless = ("adapter_step", "held_out_loss_after", "held_out_loss_before", "n_checkpoints")
    assert [result(resumed)[name] for name in timeless] == [result(whole)[name] for name in timeless]


@pytest.mark.parametrize("harm", ["gone", "damaged"])
def test_a_lost_best_one_is_said_and_looked_for_anew(
    harm: str, byte_model: Path, tmp_path: Path, command: Cli
) -> None:
    """Among that of the checkpoint which the resume begins from and those after it."""
    whole = overshooting(byte_model, tmp_path, command, save_every=1, keep_checkpoints=4)
    resumed = killed_after(6, whole, tmp_path / "resumed")
    best = resumed / "checkpoints" / f"step-{BEST:06d}"
    assert best.is_dir()
    if harm == "gone":
        shutil.rmtree(best)
    else:
        flip_a_bit(best / checkpoint.ADAPTER)
    code, out, err = command("resume", resumed)
    assert code == 0, err
    assert f"The checkpoint of step {BEST} is {harm}" in out
    losses = {row["step"]: row["held_out_loss"] for row in metrics(resumed)[5:]}
    assert result(resumed)["adapter_step"] == min(losses, key=lambda step: losses[step])


def test_a_best_one_lost_after_the_last_step_leaves_the_last(
    byte_model: Path, tmp_path: Path, command: Cli
) -> None:
    whole = overshooting(byte_model, tmp_path, command, save_every=1)
    resumed = killed_after(8, whole, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / f"step-{BEST:06d}")
    code, _, err = command("resume", resumed)
    assert code == 0, err
    assert (result(resumed)["adapter_step"], len(metrics(resumed))) == (8, 8)
    assert result(resumed)["held_out_loss_after"] == metrics(resumed)[-1]["held_out_loss"]
    assert _adapter(resumed) == _saved(resumed, 8)


def test_an_early_stop_ends_the_run_and_a_resume_knows_it(
    byte_model: Path, tmp_path: Path, command: Cli
) -> None:
    """Killed after its last checkpoint and before the adapter is there, it trains no further."""
    run = overshooting(byte_model, tmp_path, command, "--early-stop", "3", save_every=8)
    assert len(metrics(run)) == 6
    assert steps_kept(run) == [BEST, 6]
    said = result(run)
    assert (said["steps"], said["adapter_step"]) == (6, BEST)
    assert said["stop_reason"] == "early stop after 3 evaluations without a better one than step 3's"
    resumed = killed_after(6, run, tmp_path / "resumed")
    code, out, err = command("resume", resumed)
    assert code == 0, err
    assert "stopped early stop after 3 evaluations" in out
    assert learned(resumed) == learned(run)
    assert _adapter(resumed) == _adapter(run)
    code, _, err = command("resume", resumed)
    assert (code, "finished" in err) == (2, True)


def test_an_early_stop_after_one_evaluation_says_one(byte_model: Path, tmp_path: Path, command: Cli) -> None:
    run = overshooting(byte_model, tmp_path, command, "--early-stop", "1", save_every=8)
    assert result(run)["stop_reason"] == "early stop after 1 evaluation without a better one than step 1's"


def test_what_checkpoints_cost_is_said_once_and_summed(
    byte_model: Path, tmp_path: Path, command: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that was stopped in between, too: each of its checkpoints is counted."""
    report = loop._report

    def stopped_after_three(state: Run, *args: Any) -> None:
        report(state, *args)
        if state.step == 3:
            os.kill(os.getpid(), 2)

    data = write_rows(tmp_path / "rows.jsonl", range(30))
    run, asked = tmp_path / "run", ("--steps", "10", "--precision", "fp32", *ASKED)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_report", stopped_after_three)
        code, out, _ = command("auto", "--model", byte_model, "--data", data, *asked, "-o", run)
    assert code == 130
    assert len(re.findall(r"A checkpoint takes \d+ KiB and \d+\.\d\d s", out)) == 1
    assert command("resume", run)[0] == 0
    assert len([text for text in events(run, "checkpoint") if text.startswith("A checkpoint takes")]) == 1
    said, saved = result(run), run / "checkpoints" / "step-000010"
    assert said["n_checkpoints"] == 6  # 2, 3 and 4, 6, 8, 10
    assert said["checkpoint_bytes"] == sum(file.stat().st_size for file in saved.iterdir())
    assert said["checkpoint_seconds"] > 0


def test_the_checkpoint_of_a_step_is_what_the_model_was(
    byte_model: Path, tmp_path: Path, command: Cli
) -> None:
    """Saved after the evaluation of that step and before the next update."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    report = loop._report

    def watched(state: Run, *args: Any) -> None:
        report(state, *args)
        seen[state.step] = {n: t.detach().clone() for n, t in adapter_state(state.model).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_report", watched)
        run = overshooting(byte_model, tmp_path, command, save_every=1, keep_checkpoints=8)
    for step, tensors in seen.items():
        saved = load(run / "checkpoints" / f"step-{step:06d}").adapter
        assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
