"""`lowvram export` as a user types it: a real run for every engine, each mistake with a clear message."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.llama_cpp import LlamaCpp, assert_agrees
from tests.test_gguf import PROMPT, written
from tests.test_gguf_lora import adapted
from tests.tiny_gguf import byte_level, saved_model
from tests.tiny_runs import ASKED, Cli, command, write_rows

__all__ = ["command"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A base with an adapter folder of it."""
    base = saved_model(tmp_path / "base", "llama")
    adapted(base, tmp_path / "adapter")
    byte_level("gpt-2").save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_a_run_leaves_for_every_engine(tmp_path: Path, command: Cli) -> None:
    """Trained, exported four ways; the merged file and the base with the adapter's file answer alike."""
    base = saved_model(tmp_path / "base", "llama", byte_level("smollm"))
    data, run = write_rows(tmp_path / "rows.jsonl", range(40)), tmp_path / "My run"
    code, _, err = command("auto", "--model", base, "--data", data, "--steps", 3, *ASKED, "-o", run)
    assert code == 0, err
    code, out, err = command("export", run, "--to", "gguf", "--type", "f16")
    assert code == 0, err
    assert "model-f16.gguf" in out
    code, _, err = command("export", run, "--to", "lora-gguf")
    assert code == 0, err
    answers = [
        engine.goes_on(PROMPT[:20], 8)["tokens"]
        for engine in (
            LlamaCpp(run / "model-f16.gguf"),
            LlamaCpp(written(tmp_path, base), run / "adapter.gguf"),
        )
    ]
    assert answers[0] == answers[1]
    code, out, err = command("export", run, "--to", "ollama")
    assert code == 0, err
    assert "ollama create my-run -f Modelfile" in out
    assert sorted(file.name for file in (run / "ollama").iterdir()) == [
        "Modelfile",
        "README.md",
        "model.gguf",
    ]
    text = (run / "ollama" / "Modelfile").read_text()
    assert "PARAMETER num_ctx 512" in text  # the model's longest
    assert 'PARAMETER stop "<|im_end|>"' in text
    code, out, err = command("export", run, "--to", "vllm")
    assert code == 0, err
    assert "--max-lora-rank 8" in out
    assert f"my-run={run / 'adapter'}" in out
    _assert_shareable(run, base, command)


def _assert_shareable(run: Path, base: Path, command: Cli) -> None:
    """The adapter's folder for others: plain peft makes of it what it makes of the run's; no path."""
    code, _, err = command("export", run, "--to", "adapter")
    assert code == 0, err
    shared = run / "adapter-to-share"
    config = json.loads((shared / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    ids = torch.arange(8)[None]
    plain = AutoModelForCausalLM.from_pretrained(base)
    without = plain(ids).logits
    model = PeftModel.from_pretrained(plain, run / "adapter")
    own = model(ids).logits
    model.load_adapter(shared, "shared")
    model.set_adapter("shared")
    assert torch.equal(model(ids).logits, own)
    assert not torch.equal(own, without)
    tokenizer = AutoTokenizer.from_pretrained(shared)
    assert tokenizer("a b").input_ids == AutoTokenizer.from_pretrained(base)("a b").input_ids
    assert "| held-out loss after |" in (shared / "README.md").read_text()
    assert not [f for f in shared.iterdir() if str(run.parent).encode() in f.read_bytes()]


def test_no_path_nor_user_name_leaves(home: Path, command: Cli) -> None:
    for to in ("gguf", "lora-gguf"):
        assert command("export", home / "adapter", "--to", to)[0] == 0
    for file in (home / "adapter").glob("*.gguf"):
        said = {name: str(field.contents()) for name, field in GGUFReader(file).fields.items()}
        assert said["general.name"] == "base"
        assert not [name for name, text in said.items() if str(home) in text]


def test_q4_k_m_by_a_program(home: Path, command: Cli) -> None:
    """One that fails, then one that copies: what it gets is whole, in the base's 16 bits."""
    program = home / "llama-quantize"
    program.write_text("#!/bin/sh\necho 'no such type' >&2\nexit 3\n")
    program.chmod(0o755)
    asked = ("export", home / "adapter", "--to", "gguf", "--type", "q4_k_m", "--quantizer", program)
    code, _, err = command(*asked)
    assert code == 2
    assert "ended with 3 and said: no such type" in err
    assert not list((home / "adapter").glob("*gguf*"))
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] && cp "$1" "$2"\n')
    code, _, err = command(*asked)
    assert code == 0, err
    assert [file.name for file in (home / "adapter").glob("*gguf*")] == ["model-q4_k_m.gguf"]
    model = adapted(home / "base", home / "again")
    assert_agrees(model, LlamaCpp(home / "adapter" / "model-q4_k_m.gguf"), PROMPT, 8, tolerance=0.03)


def test_q4_k_m_by_the_program_on_the_path(home: Path, command: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no package brings ggml; and without either, it is said what to install."""
    monkeypatch.setattr("lowvram.export.gguf_kquants._MODULE", "no_such_module")
    asked = ("export", home / "adapter", "--to", "gguf", "--type", "q4_k_m")
    code, _, err = command(*asked)
    assert code == 2
    assert "pip install xllamacpp" in err
    (home / "llama-quantize").write_text('#!/bin/sh\necho "[   1/   2] x"; cp "$1" "$2"\n')
    (home / "llama-quantize").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")
    code, _, err = command(*asked)
    assert code == 0, err
    assert (home / "adapter" / "model-q4_k_m.gguf").stat().st_size > 100_000


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--to", "onnx"), "--to 'onnx' is unknown"),
        (("--to", "gguf", "--type", "q3_x"), "no GGUF type 'q3_x'"),
        (("--to", "lora-gguf", "--check"), "--check is not used by --to lora-gguf"),
        (("--to", "vllm", "--type", "f16"), "--type is not used by --to vllm"),
        (("--to", "adapter", "--type", "f16"), "--type is not used by --to adapter"),
        (("--to", "vllm", "--push", "me/x"), "--push is not used by --to vllm"),
        (("--to", "gguf", "--public"), "--public says how to push"),
        (("--to", "lora-gguf", "--quantizer", "x"), "--quantizer is not used"),
        (("--to", "gguf", "--ollama-base", "llama3"), "--ollama-base is not used"),
        (("--to", "gguf", "--quantizer", "x"), "--quantizer is not used for --type f16"),
        (("--to", "gguf", "--type", "q6_k", "--quantizer", "gone"), "'gone' is no program"),
        (("--to", "gguf", "--base", "/no/such/base"), "/no/such/base"),
        (("--to", "gguf", "--base", ""), "--base is empty"),
        (("--to", "ollama", "--ollama-base", ""), "--ollama-base is empty"),
        (("--to", "vllm", "--base", "/no/such/base"), "no folder '/no/such/base'"),
        (("--to", "adapter", "--base", "/no/such/base"), "no folder '/no/such/base'"),
        (("--to", "gguf", "--output", "no/such/folder/x.gguf"), "no folder"),
    ],
)
def test_mistakes(home: Path, command: Cli, asked: tuple[str, ...], said: str) -> None:
    before = sorted(home.rglob("*"))
    code, _, err = command("export", home / "adapter", *asked)
    assert code == 2
    assert said in err
    assert "What to do" in err
    assert sorted(home.rglob("*")) == before


def test_empty_settings_of_a_merge_are_refused(home: Path, command: Cli) -> None:
    for flag, said in (("--base", "--base is empty"), ("--shard-size", "'' is not a memory size")):
        code, _, err = command("merge", home / "adapter", flag, "")
        assert (code, said in err) == (2, True), err
    assert not (home / "adapter" / "merged").exists()


def test_a_checked_file(home: Path, command: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real llama.cpp agrees; with control tokens that the file calls plain text it does not."""
    asked = ("export", home / "adapter", "--to", "gguf", "--check")
    code, out, err = command(*asked, "-o", home / "good.gguf")
    assert code == 0, err
    assert "llama.cpp loads it" in out
    monkeypatch.setattr("lowvram.export.gguf_vocabulary._mark_added", lambda *_: None)
    code, _, err = command(*asked, "-o", home / "bad.gguf")
    assert code == 1
    assert "cuts a chat into" in err
    program = home / "llama-quantize"
    program.write_text('#!/bin/sh\nhead -c 5000 "$1" > "$2"\n')
    program.chmod(0o755)
    code, _, err = command(*asked, "-o", home / "bad.gguf", "--type", "q6_k", "--quantizer", program)
    assert code == 1
    assert "llama.cpp does not load the file" in err
    assert [file.name for file in home.glob("*bad*")] == []


def test_what_is_there_stays(home: Path, command: Cli) -> None:
    for to, name in (("gguf", "model-f16.gguf"), ("lora-gguf", "adapter.gguf"), ("ollama", "ollama")):
        (home / "adapter" / name).write_text("mine")
        code, _, err = command("export", home / "adapter", "--to", to)
        assert code == 2
        assert "exists already" in err
        assert (home / "adapter" / name).read_text() == "mine"


def test_a_truncated_base_and_a_foreign_one_are_refused(home: Path, command: Cli) -> None:
    other = saved_model(home / "other", "llama", hidden_size=128)
    code, _, err = command("export", home / "adapter", "--to", "gguf", "--base", other)
    assert code == 2
    assert "in the adapter" in err
    code, _, err = command("export", home / "adapter", "--to", "lora-gguf", "--base", other)
    assert code == 2
    assert "in the adapter" in err
    weights = home / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = command("export", home / "adapter", "--to", "gguf")
    assert code == 2
    assert "is cut off" in err
    assert not list(home.rglob("*.gguf*"))


@pytest.mark.parametrize("to", ["vllm", "adapter"])
def test_a_foreign_base_is_refused_where_no_weight_is_read(home: Path, command: Cli, to: str) -> None:
    """By names, then by shapes; a hub id that is not to be had is believed."""
    saved_opt(home / "opt")
    wide = saved_model(home / "wide", "llama", hidden_size=128)
    for base, said in ((home / "opt", "does not have"), (wide, "in the adapter")):
        code, out, err = command("export", home / "adapter", "--to", to, "--base", base)
        assert (code, out) == (2, "")
        assert said in err
        assert not (home / "adapter" / "adapter-to-share").exists()
    code, _, err = command("export", home / "adapter", "--to", to, "--base", "me/nobody-knows-it")
    assert code == 0, err


def test_ollama_base_with_the_adapter_apart(home: Path, command: Cli) -> None:
    code, _, err = command("export", home / "adapter", "--to", "ollama", "--ollama-base", "smollm2:135m")
    assert code == 0, err
    folder = home / "adapter" / "ollama"
    assert sorted(file.name for file in folder.iterdir()) == ["Modelfile", "README.md", "adapter.gguf"]
    assert "FROM smollm2:135m\nADAPTER ./adapter.gguf" in (folder / "Modelfile").read_text()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals as on POSIX")
def test_ctrl_c_leaves_nothing(home: Path) -> None:
    """A real process with a program that would quantize for a minute, interrupted while it does."""
    program = home / "llama-quantize"
    program.write_text('#!/bin/sh\ntouch "$0.runs"\nexec sleep 60\n')
    program.chmod(0o755)
    arguments = [home / "adapter", "--to", "gguf", "--type", "q4_k_m", "--quantizer", program]
    code = "from lowvram.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "export", *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )
    while not (home / "llama-quantize.runs").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "The export was stopped; nothing was written." in " ".join(err.split())
    assert not list((home / "adapter").glob("*gguf*"))


def saved_opt(folder: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    OPTForCausalLM(OPTConfig(**shape, vocab_size=100, word_embed_proj_dim=32)).save_pretrained(folder)


def test_an_unsupported_base_is_refused_before_any_work(tmp_path: Path, command: Cli) -> None:
    adapted(saved_model(tmp_path / "base", "llama"), tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    saved_opt(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()  # what is never looked at
    for more in ((), ("--dry-run",)):
        code, _, err = command("export", tmp_path / "adapter", "--to", "gguf", *more)
        assert code == 2
        assert "'OPTForCausalLM' cannot be written as GGUF here; these can: Gemma2ForCausalLM" in err
    assert json.loads((tmp_path / "base" / "config.json").read_text())["model_type"] == "opt"


def _script(*given: object) -> tuple[int, str, str]:
    file = Path(__file__).parents[1] / "scripts" / "merge_and_export.py"
    command = [sys.executable, str(file), *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, " ".join(done.stdout.split()), " ".join(done.stderr.split())


def test_the_script_merges_and_exports(home: Path, command: Cli) -> None:
    """With a base that moved; a second time only what is missing is made, by the command that is said."""
    moved = (home / "base").rename(home / "moved")
    given = (home / "adapter", "--no-verify", "--base", moved, "--to", "gguf", "--type", "q8_0")
    code, _, err = _script(*given)
    assert code == 0, err
    assert (home / "adapter" / "merged" / "model.safetensors").is_file()
    file = home / "adapter" / "model-q8_0.gguf"
    code, _, err = _script(*given)
    assert (code, f"{file}' exists already" in err) == (2, True), err
    file.unlink()
    code, _, err = _script(*given)
    assert (code, "merged' exists already" in err) == (2, True), err
    _, _, alone = err.partition("The export needs no merged folder; alone it is: lowvram ")
    code, _, err = command(*shlex.split(alone))
    assert (code, file.is_file()) == (0, True), err


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("--to", "bogus"), "--to 'bogus' is unknown"),
        (("--to=gguf", "--type", "q9"), "q9"),
        (("--to", "gguf", "--ollama-base", "x"), "--ollama-base is not used by --to gguf"),
    ],
)
def test_the_script_refuses_an_export_before_it_merges(home: Path, asked: tuple[str, ...], says: str) -> None:
    code, _, err = _script(home / "adapter", *asked)
    assert (code, says in err) == (2, True), err
    assert not (home / "adapter" / "merged").exists()


def test_the_script_tells_its_use() -> None:
    code, out, _ = _script("--help")
    assert (code, "RUN [merge's flags]" in out) == (0, True)


def test_a_dry_run_writes_nothing(home: Path, command: Cli) -> None:
    before = sorted(home.rglob("*"))
    for to in ("gguf", "lora-gguf", "ollama", "vllm", "adapter"):
        code, _, err = command("export", home / "adapter", "--to", to, "--dry-run")
        assert code == 0, err
    code, _, err = command("export", home / "adapter", "--to", "adapter", "-o", home / "base", "--dry-run")
    assert (code, "exists already" in err) == (2, True)
    assert sorted(home.rglob("*")) == before


def test_a_dry_run_refuses_what_the_export_does(
    home: Path, command: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in the same words: DoRA and another base where no weight is read, no room, no place to write."""
    adapted(home / "base", home / "dora", use_dora=True)
    wide = saved_model(home / "wide", "llama", hidden_size=128)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    for run, *more in (
        ("dora", "--to", "vllm"),
        ("adapter", "--to", "vllm", "--base", wide),
        ("adapter", "--to", "adapter", "--base", wide),
        ("adapter", "--to", "gguf"),
        ("adapter", "--to", "ollama"),
        ("adapter", "--to", "adapter", "-o", home / "base" / "config.json" / "sub"),
    ):
        before = sorted(home.rglob("*"))
        refused = command("export", home / run, *more)
        assert refused[0] in (2, 3)
        code, out, err = command("export", home / run, *more, "--dry-run")
        assert (code, out) == refused[:2]
        told = refused[2].replace(", nothing was written", "").partition("Error:")[2]
        assert err.partition("Error:")[2] == told != ""
        assert sorted(home.rglob("*")) == before
