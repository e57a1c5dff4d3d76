"""A screen that goes away takes no work with it: closed pipes, closed terminals, the end of a process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowvram import cli, cli_requests
from lowvram.errors import DoesNotFitError
from lowvram.screen import optional_screen
from tests.fault_run import adapter_bytes, learned, save_plan, saved_step
from tests.forked_cli import ForkedCli

STEPS = 6


@pytest.fixture(scope="module")
def plan(forked_cli: ForkedCli, fault_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "plan.yaml"
    return save_plan(forked_cli, fault_home, file, total_steps=STEPS, evaluate_every=3)


@pytest.fixture(scope="module")
def whole(forked_cli: ForkedCli, plan: Path) -> Path:
    run = plan.parent / "whole"
    assert forked_cli.run("train", plan, "-o", run).code == 0
    return run


@pytest.mark.parametrize(("kind", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("how", ["pipe", "terminal"])
def test_a_signal_without_a_screen_saves_the_step(
    how: str, kind: str, code: int, forked_cli: ForkedCli, plan: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = forked_cli.run("train", plan, "-o", run, fault="screen_goes", number=2, how=how, kind=kind)
    assert (ended.code, ended.err) == (code, "")
    assert saved_step(run) == 2
    assert forked_cli.run("resume", run).code == 0
    assert learned(run) == learned(whole)


@pytest.mark.parametrize("how", ["pipe", "terminal"])
def test_a_run_whose_screen_goes_ends_as_any_other(
    how: str, forked_cli: ForkedCli, plan: Path, whole: Path, tmp_path: Path
) -> None:
    """As under `| head -20`: trained to its end, result and all, with exit code 0."""
    run = tmp_path / "run"
    ended = forked_cli.run("train", plan, "-o", run, fault="screen_goes", number=2, how=how)
    assert (ended.code, ended.err) == (0, "")
    assert learned(run) == learned(whole)
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert (run / "result.json").is_file()


def test_nothing_is_said_of_a_closed_pipe_when_the_process_ends() -> None:
    """Python flushes once more at its end; a text without its newline is what it would still hold."""
    code = (
        "import sys\nfrom rich.console import Console\nfrom lowvram.screen import optional_screen\n"
        "with optional_screen():\n"
        "    for _ in range(3):\n        Console().print('x' * 10_000)\n"
        "    sys.stdout.write('more')\n"
        "sys.stdout.write('and more')\n"
        "print('still here', file=sys.stderr)"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "still here\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_the_screen_is_told_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no step from a run, but `> FILE` that lost what was printed does not exit with 0."""
    done, full = [], open("/dev/full", "w")  # noqa: SIM115  # closed below, where it may fail
    monkeypatch.setattr(sys, "stdout", full)

    @optional_screen()
    def run() -> None:
        sys.stdout.write("step 1\n")
        sys.stdout.flush()
        done.append(1)

    with pytest.raises(DoesNotFitError, match="Not all could be printed: No space left"):
        run()
    assert (done, sys.stdout) == ([1], full)
    full.close()


def test_one_object_on_stdout_fails_as_any_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto --dry-run --json`: its result is what it prints there."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    seen: list[object] = []
    monkeypatch.setattr(cli_requests, "planned", lambda _: None)
    monkeypatch.setattr(cli, "_show", lambda *_: seen.append(sys.stdout))
    for flags in (["--json"], []):
        with pytest.raises(SystemExit):
            cli.app(["auto", "--model", "m", "--data", "d", "--dry-run", *flags])
    assert [each is stream for each in seen] == [True, False]


def test_what_can_be_printed_is_printed_and_the_streams_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    with optional_screen():
        sys.stdout.write("told\n")
        assert sys.stderr is None
    assert (sys.stdout, stream.getvalue()) == (stream, "told\n")
