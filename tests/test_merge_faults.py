"""Merges that are killed, stopped, doubled or run out of disk: nothing that looks finished is left."""

from __future__ import annotations

import io
import os
import shutil
import signal
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
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


def test_a_finished_merge_is_not_made_again_nor_taken_for_another_s(adapter: Path, tmp_path: Path) -> None:
    """Another base or adapter of the same shapes is told by its numbers."""
    console, out = Console(file=io.StringIO()), tmp_path / "out"
    plain = MergeWishes(verify=False)
    merge_run(adapter, out, console, wishes=plain)
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert merge_run(adapter, out, console, wishes=plain).n_merged == 4
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="exists already"):
        merge_run(adapter, out, console, wishes=MergeWishes(verify=False, dtype="fp32"))
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({n: tensor * 1.5 for n, tensor in tensors.items()}, other / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="exists already"):
        merge_run(other, out, console, wishes=plain)
    base = Path(shutil.copytree(adapter.parent / "base", tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    save_file({n: tensor * 1.5 for n, tensor in tensors.items()}, base / "model.safetensors")
    with pytest.raises(ConfigError, match="exists already"):
        merge_run(adapter, out, console, base=str(base), wishes=plain)
    (out / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="exists already"):
        merge_run(adapter, out, console, wishes=plain)
