"""scripts/gpu_check.py as far as it goes without a GPU: self-check, plans for cards, rows that last."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowvram import hardware
from lowvram.errors import ConfigError, DoesNotFitError
from lowvram.hardware import Hardware
from lowvram.units import GiB, MiB
from tests.conftest import LLAMA_8B, QWEN2_7B

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check  # noqa: E402
import gpu_check_model  # noqa: E402
import gpu_check_run  # noqa: E402
from gpu_check_rows import COLUMNS, Machine, Row, append  # noqa: E402

MACHINE = Machine(
    gpu="NVIDIA H100", driver="580", torch="2", transformers="5", bitsandbytes="0", peft="0", lowvram="0"
)
CONTEXT = 450 * MiB


def _here() -> Hardware:
    """This machine as if it had a GPU whose context was measured."""
    card = hardware.card_of_size(80 * GiB, hardware.probe())
    return card.model_copy(update={"context_bytes": CONTEXT, "context_measured": True})


@pytest.mark.slow
def test_the_self_check_passes_without_a_gpu() -> None:
    """A tiny NF4 model built from random weights, really stepped, against the prediction."""
    code = "import sys, gpu_check; from rich.console import Console; sys.exit(gpu_check.on_cpu(Console()))"
    path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no NVIDIA GPU here" in done.stdout
    assert done.stdout.count("against the prediction; 1 % is allowed") == 2  # whole sequences and tiles
    assert "28 of 28 checks of levers and of recovery passed" in done.stdout


@pytest.mark.parametrize(("measured", "code"), [(1000, 0), (1009, 0), (991, 0), (1020, 1), (980, 1)])
def test_the_self_check_can_fail(monkeypatch: pytest.MonkeyPatch, measured: int, code: int) -> None:
    row = Row(check="self-check", predicted_allocated_bytes=1000, measured_allocated_bytes=measured)

    def stage(*given: Any) -> None:
        given[-1](row)

    monkeypatch.setattr(gpu_check, "run_stage", stage)
    assert gpu_check.on_cpu(Console(quiet=True)) == code
    for outcome in ("differs", "failed"):
        wrong = Row(check="parity", outcome=outcome, gradient_error=0.2, gradient_limit=0.1)
        monkeypatch.setattr(
            gpu_check, "run_stage", lambda *given, w=wrong: [given[-1](r) for r in (row, w)] and None
        )
        assert gpu_check.on_cpu(Console(quiet=True)) == 1
    monkeypatch.setattr(gpu_check, "run_stage", lambda *_: "exit code -9")
    assert gpu_check.on_cpu(Console(quiet=True)) == 1


def test_rows_are_added_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, now = tmp_path / "benchmarks" / "gpu.csv", datetime(2026, 11, 23, 10, 11, 12, tzinfo=timezone.utc)
    append(out, MACHINE, Row(check="dropout", assumed_bytes=100, measured_bytes=101, note='a "b", c'), now)
    append(out, MACHINE, Row(check="plan", card_gib=8, levers={"loss_chunk_tokens": 256}), now)
    with out.open() as handle:
        first, second = csv.DictReader(handle)
    assert tuple(first) == COLUMNS
    assert first["date"] == "2026-11-23T10:11:12+00:00"
    assert (first["gpu"], first["note"], first["measured_bytes"]) == ("NVIDIA H100", 'a "b", c', "101")
    assert (first["seq_len"], second["levers"]) == ("", '{"loss_chunk_tokens": 256}')
    before = out.read_text()

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", cut)
    with pytest.raises(KeyboardInterrupt):
        append(out, MACHINE, Row(check="plan"), now)
    assert out.read_text() == before
    assert [p.name for p in out.parent.iterdir()] == ["gpu.csv"]


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("date,gpu\n2026,H100\n")
    with pytest.raises(ConfigError, match="other columns"):
        append(tmp_path / "old.csv", MACHINE, Row(check="plan"))
    assert (tmp_path / "old.csv").read_text() == "date,gpu\n2026,H100\n"


def test_errors_are_of_the_measurement() -> None:
    assert Row(
        check="plan", predicted_reserved_bytes=100, measured_reserved_bytes=103
    ).error == pytest.approx(0.03)
    assert Row(check="dropout", assumed_bytes=100, measured_bytes=80).error == pytest.approx(-0.2)
    assert Row(check="cublas", assumed_bytes=0, measured_bytes=80).error is None
    assert Row(check="beyond", measured_reserved_bytes=80).error is None


def _stage(tmp_path: Path, code: str) -> list[str]:
    """A stage that begins with one whole row."""
    head = f"import sys, time; f = open({str(tmp_path / 'x.rows')!r}, 'a', buffering=1)\n"
    row = Row(check="plan", seq_len=64).model_dump_json()
    return [sys.executable, "-c", f"{head}f.write({row!r} + chr(10))\n{code}"]


@pytest.mark.parametrize(
    ("code", "seconds", "problem", "n_rows"),
    [
        ("", 60, None, 1),
        ("print('CUDA error: misaligned'); sys.exit(3)", 60, "exit code 3: CUDA error: misaligned", 1),
        ('f.write(\'{"check": "cut\'); f.flush(); import os; os.abort()', 60, "exit code -6", 1),
        ("time.sleep(60)", 3, "time limit of 3 s", 1),
    ],
)
def test_what_a_stage_measured_outlives_it(
    tmp_path: Path, code: str, seconds: float, problem: str | None, n_rows: int
) -> None:
    rows: list[Row] = []
    told = gpu_check.run_stage(_stage(tmp_path, code), tmp_path / "x.rows", seconds, rows.append)
    assert (told or "").startswith(problem or "")
    assert (told is None) == (problem is None)
    assert [row.seq_len for row in rows] == [64] * n_rows


def test_a_recorded_step_is_replayed_and_kept_as_json() -> None:
    """1,000 bytes in a segment of 2 MiB, as torch records them; what is kept replays to the same."""
    place = {"addr": 1 << 30, "stream": 0, "frames": [{"name": "f", "line": 1, "filename": "x"}]}
    trace = [
        {"action": "segment_alloc", "size": 2 * MiB, **place},
        {"action": "alloc", "size": 1000, **place},
    ]
    block = {"address": 1 << 30, "size": 1024, "requested_size": 1000, "state": "active_allocated"}
    segment = {"device": 0, "total_size": 2 * MiB, "blocks": [block]}
    snapshot = {"segments": [segment], "device_traces": [trace]}
    row = gpu_check_run._replayed(snapshot)
    assert (row.assumed_bytes, row.measured_bytes, row.measured_allocated_bytes) == (2 * MiB, 2 * MiB, 1024)
    kept = json.loads(json.dumps(gpu_check_run._without_frames(snapshot)))
    assert "frames" not in json.dumps(kept)
    assert gpu_check_run._replayed(kept) == row


_STUB = """
import json, os, sys, time
stage, given = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
def emit(**row):
    with open(given["--rows"], "a") as handle:
        handle.write(json.dumps(row) + chr(10))
if stage == "small":
    with open(given["--hardware"], "w") as handle:
        handle.write(HARDWARE)
    emit(check="context", measured_bytes=1)
elif stage == "micro":
    sys.exit("a kernel failed")
elif stage == "levers":
    emit(check="parity", outcome=OUTCOME)
elif stage == "tiles":
    emit(check="tiles", phase="all", measured_reserved_bytes=7)
elif stage == "answers":
    emit(check="answers", phase="all", measured_reserved_bytes=9)
elif stage == "plan":
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    if given["--model"] == "13b":
        emit(check="refused", card_gib=8.0, model="13b", outcome="refused")
    else:
        open(given["--job"], "w").close()
elif stage == "card":
    emit(check="plan", card_gib=8.0, model=given["--model"], phase="all", measured_reserved_bytes=5)
    time.sleep(60 if given["--model"] == "llama-8b" else 0)
"""


@pytest.mark.parametrize(("outcome", "code"), [("ran", 0), ("differs", 1), ("failed", 1)])
def test_the_whole_check_goes_on_past_what_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: str, code: int
) -> None:
    """Every stage replaced by a stand-in: a failing kernel, a lever, a refusal, a hanging card."""
    stub = _STUB.replace("HARDWARE", repr(_here().model_dump_json())).replace("OUTCOME", repr(outcome))
    (tmp_path / "gpu_check_run.py").write_text(stub)
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    monkeypatch.setattr(gpu_check, "_LEAST_SECONDS", 1.0)
    out = tmp_path / "out.csv"
    given = ("--cards", "8", "--models", "qwen2-7b,llama-8b,13b", "--minutes", "0.05", "--out", str(out))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *given])
    assert gpu_check.on_gpu(gpu_check.arguments(), Console(quiet=True)) == code
    with out.open() as handle:
        rows = [(row["check"], row["model"], row["outcome"]) for row in csv.DictReader(handle)]
    assert rows == [
        ("context", "", "ran"),
        ("stopped", "", "stopped"),
        ("parity", "", outcome),
        ("tiles", "", "ran"),
        ("answers", "", "ran"),
        ("plan", "qwen2-7b", "ran"),
        ("plan", "llama-8b", "ran"),
        ("stopped", "llama-8b", "stopped"),
        ("refused", "13b", "refused"),
    ]


def test_what_most_ask_for_comes_first() -> None:
    everything = gpu_check.ordered(gpu_check.CARDS, gpu_check.MODELS)
    assert len(everything) == len(set(everything)) == 16
    assert everything[:5] == [*gpu_check.REFERENCES, (8.0, "13b")]
    assert gpu_check.ordered((12.0,), ("13b", "qwen2-7b")) == [(12.0, "13b"), (12.0, "qwen2-7b")]


@pytest.mark.parametrize(("name", "known"), [("qwen2-7b", QWEN2_7B), ("llama-8b", LLAMA_8B)])
def test_shapes_are_the_published_ones(name: str, known: dict[str, object]) -> None:
    """The longest context is to be a matter of memory, so all models know as many positions."""
    config = gpu_check_model.config_of(name)
    shape = {key: value for key, value in known.items() if key != "architectures"}
    assert {key: getattr(config, key) for key in shape} == shape


def test_a_plan_for_an_emulated_card() -> None:
    """8 GiB less the measured context and the profile's margin, nothing held; the longest fits too."""
    job = gpu_check_run.plan_job("qwen2-7b", 8.0, _here())
    plan = job.plan
    assert plan.budget_bytes == pytest.approx(0.98 * 8 * GiB - CONTEXT, abs=2)
    assert (plan.device.held_bytes, plan.device.context_bytes) == (0, CONTEXT)
    assert plan.estimate.peak_reserved_bytes <= job.at_largest.peak_reserved_bytes <= plan.budget_bytes
    assert plan.estimate.peak_reserved_bytes > 0.5 * plan.budget_bytes
    assert plan.largest_seq_len >= plan.seq_len
    row = job.row("plan")
    assert (row.card_gib, row.model, row.seq_len) == (8.0, "qwen2-7b", plan.seq_len)
    assert row.budget_bytes == plan.budget_bytes


def test_what_cannot_fit_is_refused_by_the_planner() -> None:
    with pytest.raises(DoesNotFitError, match="budget"):
        gpu_check_run.plan_job("30b", 8.0, _here())


def test_every_stage_of_a_card_really_runs() -> None:
    """The whole sequence, on the CPU, which has no counters: each stage tells that it ran."""
    job = gpu_check_run.plan_job("tiny", 8.0, _here())
    changes = {"compute_dtype": "fp32", "seq_len": 32, "micro_batch": 1, "accumulation": 4}
    plan = job.plan.model_copy(update={**changes, "optimizer": "adamw", "largest_seq_len": 50})
    job = job.model_copy(update={"plan": plan})
    rows: list[Row] = []
    gpu_check_run.run_job(job, rows.append, device="cpu")
    whole = [row for row in rows if row.phase == "all"]
    assert [(row.check, row.seq_len, row.outcome) for row in whole] == [
        ("plan", 32, "ran"),
        ("largest", 50, "ran"),
        ("beyond", 52, "ran"),
    ]
    planned = {row.phase for row in rows if row.check == "plan"}
    assert planned == {"all", "load", "forward", "backward", "clip", "optimizer", "evaluation", "other"}
    assert {row.phase for row in rows if row.check == "largest"} >= {"forward", "backward", "optimizer"}
    assert whole[0].tokens_per_second
    assert whole[0].predicted_reserved_bytes == plan.estimate.peak_reserved_bytes
    assert whole[1].predicted_reserved_bytes == job.at_largest.peak_reserved_bytes
    assert whole[2].predicted_reserved_bytes is None
    limited: Any = job.model_copy(update={"model_limit": 50})
    gpu_check_run._run_beyond(limited, None, rows.append)  # type: ignore[arg-type]  # no trial is touched
    assert rows[-1].outcome == "not run: the model knows 50 positions"
