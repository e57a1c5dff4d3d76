"""auto, resume and merge on a tiny real model: moved, damaged and refused runs, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from lowvram import cli, pipeline
from lowvram.errors import ConfigError
from lowvram.training import checkpoint, loop
from lowvram.training import data as training_data
from lowvram.training import run as training_run
from tests.tiny_models import save_llama

Run = Callable[..., tuple[int, str, str]]
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SHORT = ("--steps", "2", "--batch", "2", "--rank", "2", "--seq-len", "64", "--precision", "fp32")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line inside this process: exit code, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowvram", *map(str, args)])
        old = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        signal.signal(signal.SIGINT, old)
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), " ".join(out.split()), " ".join(err.split())

    return call


@pytest.fixture(scope="module")
def home(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer model of SmolLM2's vocabulary and 30 rows."""
    folder = tmp_path_factory.mktemp("home")
    save_llama(smollm, folder / "tiny", **TINY, num_hidden_layers=2, tie_word_embeddings=True)
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def finished(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> Path:
    """A finished run made with relative names."""
    monkeypatch.chdir(home)
    output = tmp_path / "run"
    given = ("auto", "--model", "tiny", "--data", "rows.jsonl", *SHORT, "-o", os.path.relpath(output))
    code, _, err = run(*given, "--log-with", "tensorboard")
    assert code == 0, err
    return output


def test_a_run_is_merged_from_another_folder_and_its_tracker_wrote(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    code, _, err = run("merge", "run")
    assert code == 0, err
    assert AutoModelForCausalLM.from_pretrained(finished / "merged").config.num_hidden_layers == 2
    (events,) = (finished / "lowvram").glob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    losses = [event.value for event in accumulator.Scalars("loss")]
    assert losses == pytest.approx([json.loads(line)["loss"] for line in _lines(finished)], rel=1e-6)


def test_a_resume_tells_the_tracker_that_the_run_began_with(
    home: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands in the run's plan, and is none of the changes that a resume refuses."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report, stopped = loop._report, tmp_path / "stopped"

    def stopped_after_one(state: training_run.Run, *args: Any) -> None:
        report(state, *args)
        os.kill(os.getpid(), signal.SIGINT)

    given = ("auto", "--model", home / "tiny", "--data", home / "rows.jsonl", *SHORT, "-o", stopped)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_report", stopped_after_one)
        assert run(*given, "--log-with", "tensorboard")[0] == 130
    code, _, err = run("resume", stopped)
    assert code == 0, err
    told = EventAccumulator(str(stopped / "lowvram"))
    told.Reload()
    assert [event.step for event in told.Scalars("loss")] == [1, 2]
    _edit(stopped, "log_with: ", "log_with: [nosuch]")
    (stopped / "result.json").unlink()
    code, _, err = run("resume", stopped)
    assert (code, "no tracker 'nosuch'" in err) == (2, True), err
    code, _, err = run("resume", stopped, "--log-with", "none", "--log-with", "wandb")
    assert (code, "Leave out --log-with none" in err) == (2, True), err
    code, _, err = run("resume", stopped, "--log-with", "none")
    assert code == 0, err
    assert "log_with: []" in (stopped / "plan.yaml").read_text()


def test_a_resume_hashes_its_checkpoint_three_times(
    home: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the door, when no other process can write there any more, and as it is read."""
    stopped, problem, hashed = tmp_path / "stopped", checkpoint._problem, list[str]()

    def stop(*_: Any) -> None:
        raise ConfigError("stopped", "")

    def noted(path: Path) -> str | None:
        hashed.append(path.name)
        return problem(path)

    given = ("auto", "--model", home / "tiny", "--data", home / "rows.jsonl", *SHORT, "-o", stopped)
    assert run(*given)[0] == 0
    (stopped / "result.json").unlink()
    monkeypatch.setattr(loop, "_trained", stop)
    monkeypatch.setattr(checkpoint, "_problem", noted)
    assert "stopped" in run("resume", stopped)[2]
    assert hashed == ["step-000002"] * 3


def test_a_tracker_that_is_missing_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ConfigError, match="'wandb' is not installed") as caught:
        pipeline.require_trackers(["wandb"])
    assert caught.value.remedy.endswith("--log-with none")


def test_a_plan_of_other_data_is_refused_before_its_folder_is_made(
    home: Path, tmp_path: Path, run: Run
) -> None:
    rows, plan, output = tmp_path / "rows.jsonl", tmp_path / "plan.yaml", tmp_path / "run"
    shutil.copy(home / "rows.jsonl", rows)
    assert run("plan", "--model", home / "tiny", "--data", rows, *SHORT, "-o", plan)[0] == 0
    content = rows.read_text()
    rows.write_text(content.replace("What", "Who "))
    for _ in range(2):  # the second time as the first
        code, _, err = run("train", plan, "-o", output)
        assert (code, "its content hash differs" in err) == (2, True), err
        assert not output.exists()
    rows.write_text(content)
    assert run("train", plan, "-o", output)[0] == 0


def test_a_packed_run_learns_as_an_unpacked_one_and_resumes(
    home: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses where a step reads everything; stopped after two steps and continued, the same bits."""
    plan, report = tmp_path / "plan.yaml", loop._report
    wishes = ("--batch", "28", "--steps", "5", "--dropout", "0", *SHORT[4:])
    assert run("plan", "--model", home / "tiny", "--data", home / "rows.jsonl", *wishes, "-o", plan)[0] == 0
    _edit(tmp_path, "micro_batch: ", "micro_batch: 2")
    _edit(tmp_path, "accumulation: ", "accumulation: 14")
    assert run("train", plan, "-o", tmp_path / "unpacked")[0] == 0
    _edit(tmp_path, "packing: ", "packing: true")
    packed = training_data.collate_packed
    rows: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(training_data, "collate_packed", lambda some: (rows.append(len(some)), packed(some))[1])
        assert run("train", plan, "-o", tmp_path / "whole")[0] == 0
    assert max(rows) > 2  # examples in a row: more than a micro-batch has

    def stopped_after_two(state: training_run.Run, *args: Any) -> None:
        report(state, *args)
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_report", stopped_after_two)
        assert run("train", plan, "-o", tmp_path / "stopped")[0] == 130
    assert len(_lines(tmp_path / "stopped")) == 2
    assert run("resume", tmp_path / "stopped")[0] == 0
    losses = {n: _learned(tmp_path / n) for n in ("unpacked", "whole", "stopped")}
    assert len(losses["whole"]) == 5
    assert losses["stopped"] == losses["whole"]
    assert losses["whole"] == [pytest.approx(step, rel=1e-4) for step in losses["unpacked"]]
    shapes = [json.loads((tmp_path / n / "receipt.json").read_text()) for n in ("unpacked", "whole")]
    assert {shape["largest_batch_tokens"] for shape in shapes} == {2 * 64}  # the proof's


def _learned(finished: Path) -> list[tuple[float, int, int, float]]:
    rows = [json.loads(line) for line in _lines(finished)]
    return [(r["loss"], r["tokens"], r["trained_tokens"], r["held_out_loss"] or 0.0) for r in rows]


def _lines(finished: Path) -> list[str]:
    return (finished / "metrics.jsonl").read_text().splitlines()


def test_what_is_missing_at_the_end_is_made_again(finished: Path, run: Run) -> None:
    code, _, err = run("resume", finished)
    assert code == 2
    assert "finished" in err
    before = json.loads((finished / "result.json").read_text())
    (finished / "result.json").write_text("")
    shutil.rmtree(finished / "adapter")
    code, _, err = run("resume", finished)
    assert code == 0, err
    after = json.loads((finished / "result.json").read_text())
    assert after["held_out_loss_after"] == pytest.approx(before["held_out_loss_after"], rel=1e-6)
    assert (finished / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda r: _edit(r, "data: ", "data: null"), "names no data"),
        (lambda r: _edit(r, "  backend: ", "  backend: cuda"), "this machine trains on"),
        (lambda r: _edit(r, "model: ", f"model: {r}/gone"), "is gone"),
        (lambda r: (r / "plan.yaml").unlink(), "plan.yaml is missing"),
        (lambda r: _replaced_by_folder(r / "metrics.jsonl"), "metrics.jsonl is a folder"),
        (lambda r: _replaced_by_file(r / "checkpoints"), "checkpoints is a file"),
        (lambda r: _replaced_by_folder(r / ".lock"), ".lock is a folder"),
    ],
    ids=[
        "no data",
        "another device",
        "no model",
        "no plan",
        "metrics a folder",
        "checkpoints a file",
        "lock",
    ],
)
def test_a_damaged_run_is_refused_before_the_model_is_loaded(
    finished: Path, run: Run, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], object], says: str
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the model was loaded")

    (finished / "result.json").unlink()
    harm(finished)
    monkeypatch.setattr("lowvram.training.set_up.load", never)
    code, _, err = run("resume", finished)
    assert (code, says in err, "What to do" in err, "--output" in err) == (2, True, True, False), err


def _edit(folder: Path, start: str, line: str) -> None:
    lines = (folder / "plan.yaml").read_text().splitlines()
    changed = [line if old.startswith(start) else old for old in lines]
    assert changed != lines
    (folder / "plan.yaml").write_text("\n".join(changed) + "\n")


def _replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replaced_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def test_merge_says_where_the_base_was_and_takes_another(finished: Path, home: Path, run: Run) -> None:
    file = finished / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert Path(config["base_model_name_or_path"]).is_absolute()
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(finished / "nowhere")}))
    code, _, err = run("merge", finished)
    assert (code, "is gone" in err, "--base" in err) == (2, True, True), err
    code, _, err = run("merge", finished, "--base", home / "tiny")
    assert code == 0, err
    file.write_text("{")
    code, _, err = run("merge", finished, "-o", finished / "again")
    assert (code, "adapter_config.json" in err) == (2, True), err


def test_ctrl_c_in_a_merge_leaves_nothing(finished: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram.export import merge

    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(merge, "write_rest", interrupted)
    before = sorted(p.name for p in finished.iterdir())
    code, _, err = run("merge", finished)
    assert (code, "nothing was written" in err) == (130, True), err
    assert sorted(p.name for p in finished.iterdir()) == before


def test_what_needs_no_plan_is_refused_before_planning(
    home: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody should wait for a search that cannot be used."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the search ran")

    monkeypatch.setattr("lowvram.planning.decide", never)
    broken = tmp_path / "broken"
    shutil.copytree(home / "tiny", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "taken.yaml").write_text("mine")
    data = home / "rows.jsonl"
    for says, args in (
        ("cut off", ("auto", "--model", broken, "--data", data)),
        ("this machine trains on cpu", ("auto", "--model", home / "tiny", "--data", data, "--vram", "8GB")),
        ("exists already", ("plan", "--model", home / "tiny", "-o", tmp_path / "taken.yaml")),
        ("no folder", ("plan", "--model", home / "tiny", "-o", tmp_path / "none" / "p.yaml")),
    ):
        code, _, err = run(*args)
        assert (code, says in err, "What to do" in err) == (2, True, True), err
    assert (tmp_path / "taken.yaml").read_text() == "mine"


def test_a_saved_plan_is_trained_as_it_is(home: Path, tmp_path: Path, run: Run) -> None:
    plan = tmp_path / "plan.yaml"
    model, data = home / "tiny", home / "rows.jsonl"
    code, _, err = run("plan", "--model", model, "--data", data, *SHORT, "-o", plan)
    assert code == 0, err
    output = tmp_path / "trained"
    code, _, err = run("train", plan, "-o", output)
    assert code == 0, err
    assert json.loads((output / "result.json").read_text())["steps"] == 2
    plan.write_text(plan.read_text().replace("micro_batch: 2", "micro_batch: 100000"))
    code, _, err = run("train", plan, "-o", tmp_path / "other")
    assert (code, "budget" in err) == (3, True), err
    assert not (tmp_path / "other").exists()
