"""An interrupted run of the real SmolLM2, through the real command line, goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
DEMO_DATA = Path(__file__).parents[2] / "lowvram" / "demo" / "answers.jsonl"
SHORT = ("--steps", "4", "--batch", "2", "--rank", "4", "--targets", "qv")


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_interrupted_and_resumed_equals_uninterrupted(lowvram: Cli, smollm: Path, tmp_path: Path) -> None:
    """SIGINT after two steps, then `resume`: the same losses to the last bit."""
    common = ("auto", "--model", smollm, "--data", DEMO_DATA, *SHORT)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done = lowvram(*common, "--output", whole)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    command = [sys.executable, "-c", "from lowvram.cli import main; main()", *map(str, common)]
    process = subprocess.Popen(
        [*command, "--output", str(parted)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    while not ((parted / "metrics.jsonl").is_file() and len(_losses(parted)) >= 2) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130
    assert not (parted / "adapter").exists()
    done = lowvram("resume", parted)
    assert done.returncode == 0, done.stderr
    assert len(_losses(whole)) == 4
    assert _losses(parted) == _losses(whole)
    again = lowvram("resume", parted)
    assert again.returncode == 2
    assert "finished" in again.stderr
