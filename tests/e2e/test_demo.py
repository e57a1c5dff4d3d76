"""The demo to its end: a small real model learns to stop."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.slow
def test_the_demo_s_answers_end_with_the_stop_token(lowvram: Cli, smollm: Path, tmp_path: Path) -> None:  # noqa: ARG001
    """Each in the style of the data, three lines, and then nothing; untrained the model goes on."""
    done = lowvram("demo", "--output", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "demo" / "answers.json").read_text())
    assert [answer["stopped"] for answer in answers["after"]] == [True] * 3, answers
    assert all("Answer:" in answer["text"] and "Try:" in answer["text"] for answer in answers["after"])
    assert sum(answer["stopped"] for answer in answers["before"]) < 3
    assert "after training 3 of 3 answers ended with the stop token" in done.stdout
