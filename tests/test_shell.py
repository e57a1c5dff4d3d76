"""Commands that are printed can be typed: paths with blanks are one word, and none of the flags is lost."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from lowvram.errors import ConfigError
from lowvram.frozen import require_new_file
from lowvram.result_view import show_result
from lowvram.shell import command_line, typed
from lowvram.training.machine_warnings import MachineRules
from lowvram.training.result import RunResult
from lowvram.training.run_folder import RunFolder
from tests.forked_cli import ForkedCli
from tests.merge_cases import CASES, save_adapter, save_base
from tests.test_gguf_lora import adapted
from tests.tiny_gguf import byte_level, saved_model
from tests.tiny_runs import Cli, command

__all__ = ["command"]
ODD = ["run é 1", "it's", "$HOME", "a;b", "plain", "[x]", ""]


@pytest.mark.skipif(os.name == "nt", reason="shlex splits as a POSIX shell does")
@pytest.mark.parametrize("name", ODD)
def test_a_word_stays_one_word(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shlex.split(typed(name)) == [name]
    monkeypatch.setattr(sys, "argv", ["lowvram", "chat", name])
    assert shlex.split(command_line()) == ["lowvram", "chat", name]


def test_windows_has_double_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.shell.os", SimpleNamespace(name="nt"))
    assert typed(r"C:\my runs\1") == r'"C:\my runs\1"'
    assert typed(r"C:\runs\1") == r"C:\runs\1"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An adapter beside its base, in a folder with a blank."""
    folder = tmp_path / "my dir é"
    base = saved_model(folder / "base", "llama")
    adapted(base, folder / "adapter 1")
    byte_level("gpt-2").save_pretrained(folder / "adapter 1")
    return folder


def _said(out: str, start: str) -> list[str]:
    return shlex.split(out[out.index(start) :])


def test_an_export_s_lines_can_be_typed(home: Path, command: Cli) -> None:
    adapter = home / "adapter 1"
    _, out, _ = command("export", adapter, "--to", "gguf")
    model = adapter / "model-f16.gguf"
    assert _said(out, "llama-cli")[:2] == ["llama-cli", "-m"]
    assert _said(out, "lms import")[2] == str(model)
    _, out, _ = command("export", adapter, "--to", "lora-gguf")
    assert _said(out, "llama-cli")[-1] == str(adapter / "adapter.gguf")
    _, out, _ = command("export", adapter, "--to", "ollama")
    assert _said(out, "cd ")[1] == str(adapter / "ollama")
    _, out, _ = command("export", adapter, "--to", "vllm")
    assert _said(out, "vllm serve")[2] == str(home / "base")


def test_a_moved_base_s_remedy_keeps_the_flags(home: Path, command: Cli) -> None:
    adapter = home / "adapter 1"
    shutil.move(home / "base", home / "elsewhere")
    for given in (
        ("export", adapter, "--to", "ollama", "-o", home / "out"),
        ("merge", adapter, "-o", home / "out", "--dtype", "bf16"),
        ("generate", adapter, "-p", "hi there"),
        ("chat", adapter, "--max-new-tokens", "8"),
    ):
        code, _, err = command(*given)
        assert code == 2
        wanted = ["lowvram", *map(str, given), "--base", "PATH"]
        assert _said(err, "lowvram") == wanted


def test_a_stopped_merge_is_started_again_as_it_was(forked_cli: ForkedCli, tmp_path: Path) -> None:
    base = save_base(CASES["plain"], tmp_path / "base")
    adapter = save_adapter(base, CASES["plain"], tmp_path / "sm")
    given = ("merge", adapter, "-o", tmp_path / "my out", "--no-verify", "--dtype", "fp32")
    ended = forked_cli.run(*given, fault="signalled", moment="tensor", number=3, kind="SIGTERM")
    assert ended.code == 128 + signal.SIGTERM, ended.err
    assert _said(" ".join(ended.err.split()), "lowvram merge") == ["lowvram", *map(str, given)]


def test_a_run_s_lines_can_be_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a finished run, of one whose folder is taken, and a missing folder's."""
    run = tmp_path / "run é 1"
    result = RunResult.model_construct(
        held_out_loss_before=2.0,
        held_out_loss_after=1.0,
        held_out_perplexity_before=None,
        held_out_perplexity_after=None,
        steps=3,
        tokens=9,
        seconds=1.0,
        tokens_per_second=9.0,
        stop_reason="finished",
        adapter_step=None,
        adapter_bytes=9,
    )
    show_result(result, run, Console(width=300))
    assert f"lowvram merge {shlex.quote(str(run))} or" in capsys.readouterr().out
    assert shlex.quote(str(run)) in MachineRules(run, 0, 0)._resume
    (run / "adapter").mkdir(parents=True)
    with pytest.raises(ConfigError) as refused:
        RunFolder.refuse_used(run)
    assert shlex.split(refused.value.remedy.partition(",")[0]) == ["lowvram", "resume", str(run)]
    with pytest.raises(ConfigError) as refused:
        require_new_file(tmp_path / "no such" / "x")
    assert shlex.split(refused.value.remedy)[-1] == str(tmp_path / "no such")
