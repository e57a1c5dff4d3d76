"""The real command line on bad input: one message, the right exit code, nothing overwritten."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import QWEN2_7B

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
ROW = json.dumps({"question": "hi", "answer": "yo"})


def _refused(done: subprocess.CompletedProcess[str], code: int, *says: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    text = " ".join((done.stdout + done.stderr).split())
    for part in (*says, "What to do"):
        assert part in text, text


def test_bad_models(lowvram: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _refused(lowvram("plan", "--model", tmp_path / "none"), 2, "There is no folder")
    _refused(lowvram("plan", "--model", tmp_path / "empty"), 2, "has no config.json")
    _refused(lowvram("plan", "--model", "nobody/no-such-model"), 2, "nobody/no-such-model")


def test_bad_data(lowvram: Cli, smollm: Path, tmp_path: Path) -> None:
    bad = tmp_path / "train.jsonl"
    for lines, says in (
        ([""], "train.jsonl"),
        ([ROW] * 6 + ["{oops"], "train.jsonl:7"),
        (['{"a": 1}'], "train.jsonl:1"),
    ):
        bad.write_text("\n".join(lines))
        _refused(lowvram("auto", "--model", smollm, "--data", bad, cwd=tmp_path), 5, says)
    _refused(lowvram("data", "check", bad), 5, "train.jsonl:1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.jsonl"]


def test_a_used_output_is_left_alone(lowvram: Cli, smollm: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "plan.yaml").write_text("mine")
    data = tmp_path / "train.jsonl"
    data.write_text(f"{ROW}\n" * 3)
    _refused(lowvram("auto", "--model", smollm, "--data", data, "--output", run), 2, "holds a run")
    assert (run / "plan.yaml").read_text() == "mine"


def test_probe_json(lowvram: Cli) -> None:
    done = lowvram("probe", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["host_total_bytes"] > 1e9


def test_plan_json_keys_and_exit_code_3(
    lowvram: Cli, config_only: Callable[[dict[str, object]], Path]
) -> None:
    small = {**QWEN2_7B, "num_hidden_layers": 3}
    folder = config_only(small)
    done = lowvram("plan", "--model", folder, "--vram", "8GB", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"] is True
    assert sum(plan["components_bytes"].values()) == plan["peak_allocated_bytes"]
    keys = {"model", "device", "budget_bytes", "peak_reserved_bytes", "peak_moment", "host_ram_bytes"}
    assert keys | {"largest_seq_len", "seconds_per_step", "plan", "reasons"} <= set(plan)
    refused = lowvram("plan", "--model", folder, "--vram", "3GB", "--json")
    _refused(refused, 3, "budget", "nearest")
    assert json.loads(refused.stdout)["fits"] is False


@pytest.mark.parametrize("flags", [("--rank", "0"), ("--levers", "chekpoint=on"), ("--vram", "big")])
def test_bad_flags(
    lowvram: Cli, config_only: Callable[[dict[str, object]], Path], flags: tuple[str, str]
) -> None:
    _refused(lowvram("plan", "--model", config_only(QWEN2_7B), *flags), 2)
