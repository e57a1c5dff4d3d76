"""Merges that are killed, stopped, doubled or run out of disk: nothing that looks finished is left."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, DoesNotFitError
from lowvram.export.merge import merge_adapter
from lowvram.merge_command import MergeWishes, merge_run
from tests.forked_cli import ForkedCli
from tests.merge_cases import Case, save_adapter, save_base


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its config names its base."""
    folder = tmp_path_factory.mktemp("adapter")
    return save_adapter(save_base(Case(), folder / "base"), Case(), folder / "adapter")


def _merge(adapter: Path, output: Path) -> None:
    merge_adapter(ModelSource(str(adapter.parent / "base")), adapter, output)


def test_killed_between_two_tensors_leaves_nothing_finished_and_runs_again(
    forked_cli: ForkedCli, adapter: Path, tmp_path: Path
) -> None:
    args = ("merge", adapter, "-o", tmp_path / "out", "--no-verify")
    ended = forked_cli.run(*args, fault="signalled", moment="tensor", number=9, kind="SIGKILL")
    assert ended.code == -signal.SIGKILL, ended.err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "model.safetensors").exists()  # it was in the middle
    assert not (tmp_path / ".out.partial" / "config.json").exists()  # so nothing loads it
    ended = forked_cli.run(*args)
    assert ended.code == 0, ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2


def test_a_second_merge_into_the_same_folder_is_refused_and_harms_nothing(
    forked_cli: ForkedCli, adapter: Path, tmp_path: Path
) -> None:
    args = ("merge", adapter, "-o", tmp_path / "out", "--no-verify")
    first = forked_cli.start(*args, fault="signalled", moment="tensor", number=9, kind="SIGSTOP")
    first.until(lambda: "(stopped)" in Path(f"/proc/{first.pid}/status").read_text())
    with pytest.raises(ConfigError, match="Another process is writing"):
        _merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    os.kill(first.pid, signal.SIGCONT)
    ended = first.ended()
    assert ended.code == 0, ended.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2


def test_an_error_in_the_middle_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(ModelSource(str(adapter.parent / "base")), adapter, tmp_path / "out", progress=stop)
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_refused_before_anything_is_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DoesNotFitError, match="1000 B is free"):
        _merge(adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_already_is_not_overwritten(adapter: Path, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    _merge(adapter, used)  # an empty folder is taken
    before = sorted((file.name, file.stat().st_mtime_ns) for file in used.iterdir())
    with pytest.raises(ConfigError, match="exists already"):
        _merge(adapter, used)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        _merge(adapter, tmp_path / "file")
    assert sorted((file.name, file.stat().st_mtime_ns) for file in used.iterdir()) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_finished_merge_is_never_taken_up(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever became of it since; no hub is asked and no base opened before that is said."""
    console, out = Console(file=io.StringIO()), tmp_path / "out"
    merge_run(adapter, out, console, wishes=MergeWishes(verify=False))
    for asked in ("require_pushable", "source_of", "MergedTensors"):
        monkeypatch.setattr(f"lowvram.merge_command.{asked}", None)
    for wishes in (MergeWishes(verify=False), MergeWishes(push="me/mine")):
        with pytest.raises(ConfigError, match="exists already"):
            merge_run(adapter, out, console, wishes=wishes)
