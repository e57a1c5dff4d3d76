"""The real command line on bad input: one message, the right exit code, nothing overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram import cli
from lowvram.errors import ConfigError
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


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_terminal_without_unicode_loses_characters_only(
    lowvram: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(f'{ROW}\n{{"question": "é 😀", "answer": "yo"}}\n' * 2)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = lowvram("data", "check", data)
    assert done.returncode == 0, done.stderr
    assert "question-answer" in done.stdout
    _refused(lowvram("data", "check", "nö.jsonl"), 5, "n?.jsonl")


@pytest.mark.parametrize(
    ("raised", "says"),
    [("StoppedError('Told whole.', 'type this', 2)", "Told whole."), ("KeyboardInterrupt()", "")],
)
def test_ctrl_c_while_an_error_is_told(raised: str, says: str) -> None:
    done = _python(
        "import os, signal\n"
        "from lowvram import cli\n"
        "from lowvram.errors import StoppedError\n"
        "def app():\n"
        f"    raise {raised}\n"
        "told = cli.Console.print\n"
        "def interrupted(*args, **options):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    told(*args, **options)\n"
        "cli.app, cli.Console.print = app, interrupted\n"
        "cli.main()\n"
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert says in done.stderr


def test_escape_sequences_in_an_error_are_not_obeyed(lowvram: Cli, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("\x1b[31m{oops")
    done = lowvram("data", "check", data)
    _refused(done, 5, "train.jsonl:1", "[31m{oops")
    assert "\x1b" not in done.stderr


def test_a_broken_parquet_file_is_one_message(lowvram: Cli, tmp_path: Path) -> None:
    data = tmp_path / "train.parquet"
    data.write_bytes(b"not parquet at all")
    done = lowvram("data", "check", data)
    _refused(done, 5, "cannot be loaded")
    assert done.stderr.startswith("Error:")


def test_the_hub_client_does_not_count_its_retries() -> None:
    """Its lines come from loggers below huggingface_hub, at WARNING."""
    done = _python(
        "import sys; sys.argv = ['lowvram', '--version']\n"
        "from lowvram.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "from huggingface_hub.utils import _http\n"
        "_http.logger.warning('Retrying in 4s'); _http.logger.error('kept')"
    )
    assert "Retrying" not in done.stderr
    assert "kept" in done.stderr


def test_json_is_alone_on_stdout(lowvram: Cli, smollm: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(ROW.replace("hi", f"hi {i}") + "\n" for i in range(4)))
    short = ("--steps", "1", "--batch", "1", "--rank", "2", "--targets", "qv", "--seq-len", "64")
    common = ("--model", smollm, "--data", data, "--json", *short)
    done = lowvram("auto", *common, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 1
    assert "lowvram plan" in done.stderr
    assert "step 1/1" in done.stderr
    done = lowvram("plan", *common, "--output", tmp_path / "plan.yaml")
    assert json.loads(done.stdout)["fits"] is True
    assert "Saved" in done.stderr


def test_remedies_name_only_flags_that_the_command_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="read-only") as caught:
        cli.resume(tmp_path)
    assert "--" not in caught.value.remedy
