"""SIGKILL at random moments of one run, again and again: nothing but the last few steps is ever lost."""

from __future__ import annotations

import json
import math
import random
import signal
import time
from pathlib import Path

import pytest

from lowvram.training.run_folder import RunFolder
from tests.fault_run import adapter_bytes, learned, save_plan, saved_step
from tests.forked_cli import Command, ForkedCli

SAVE_EVERY = 3
SYNCS_OF_A_SAVE = 7  # four files, their folder, and the folder above before and after
STEPS_A_KILL = 2 * SAVE_EVERY  # at most, but for what is done while this process waits for a core


def _steps(run: Path) -> int:
    """The last step that is in metrics.jsonl."""
    records = RunFolder(run).read_metrics() if run.is_dir() else []
    return records[-1].step if records else 0


def _kill(command: Command, run: Path, draw: random.Random, start_seconds: float) -> None:
    """At any moment of starting up or, as often, of a random step after it; never many steps later."""
    starting, target = draw.random() < 0.5, _steps(run) + draw.randint(1, STEPS_A_KILL)
    end = time.monotonic() + (draw.uniform(0, 1.2 * start_seconds) if starting else math.inf)
    command.until(lambda: time.monotonic() > end or _steps(run) >= target)
    time.sleep(draw.uniform(0, 0.02))
    command.send(signal.SIGKILL)


def _started_seconds(command: Command, run: Path) -> float:
    """From a fork to its first step, on this machine and now."""
    began = time.monotonic()
    command.until(lambda: _steps(run) > 0)
    return time.monotonic() - began


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_at_most_the_steps_since_the_last_save(
    kills: int, forked_cli: ForkedCli, fault_home: Path, tmp_path: Path
) -> None:
    """Every third one at a random file of a random save; the end is the uninterrupted run's, bit by bit."""
    total = 10 + 10 * kills
    plan = save_plan(forked_cli, fault_home, tmp_path / "p.yaml", total_steps=total, save_every=SAVE_EVERY)
    whole, run = tmp_path / "whole", tmp_path / "run"
    command = forked_cli.start("train", plan, "-o", whole)
    start_seconds = _started_seconds(command, whole)
    assert command.ended().code == 0
    draw, saved, unfinished = random.Random(kills), 0, 0
    for number in range(kills):
        args = ("resume", run) if (run / "plan.yaml").is_file() else ("train", plan, "-o", run)
        if number % 3 == 2:
            at = draw.randint(1, 2 * SYNCS_OF_A_SAVE)
            ended = forked_cli.run(*args, fault="killed_at_save", number=at)
        else:
            command = forked_cli.start(*args)
            _kill(command, run, draw, start_seconds)
            ended = command.ended()
        assert ended.code == -signal.SIGKILL, ended
        before, saved = saved, saved_step(run)
        assert before <= saved <= _steps(run) <= saved + SAVE_EVERY, number
        unfinished += any((run / "checkpoints").glob(".step-*.tmp"))
    assert unfinished >= kills // 6
    assert saved > 0
    ended = forked_cli.run("resume", run)
    assert ended.code == 0, ended.err
    assert learned(run) == learned(whole)
    assert len(learned(run)) == total
    assert adapter_bytes(run) == adapter_bytes(whole)
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, whole)]
    assert len({(r["held_out_loss_before"], r["held_out_loss_after"], r["tokens"]) for r in results}) == 1
