"""The rows with which a merge is verified: held out or told to be others, never longer than a model takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.merge_cases import LLAMA, Case, save_adapter
from tests.tiny_runs import ASKED, Cli, byte_model, command, write_rows

__all__ = ["byte_model", "command"]
pytestmark = pytest.mark.usefixtures("one_thread")
MAPPED = [{"ask": f"{i} + 1?", "reply": f"it is {i + 1}"} for i in range(40)]


def _write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def trained(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the base, and for a run whose data has fields of its own names."""
    home = tmp_path_factory.mktemp("trained")
    shutil.copytree(byte_model, home / "base")
    _write(home / "rows.jsonl", MAPPED)
    return home


@pytest.fixture
def run(trained: Path, tmp_path: Path, command: Cli) -> Path:
    if not (trained / "run").exists():
        given = ("--model", trained / "base", "--data", trained / "rows.jsonl", "--precision", "bf16")
        mapping = ("--fields", "question=ask,answer=reply", "--steps", 2)
        code, _, err = command("auto", *given, *ASKED, *mapping, "-o", trained / "run")
        assert code == 0, err
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def test_rows_of_a_changed_file_are_not_called_held_out(trained: Path, run: Path, command: Cli) -> None:
    code, out, err = command("merge", run, "-o", run / "one")
    assert (code, "Verified on 2 of 2 held-out rows" in out) == (0, True), out + err
    _write(trained / "rows.jsonl", [{"ask": f"{i} - 1?", "reply": f"that is {i - 1}"} for i in range(40)])
    try:
        code, out, err = command("merge", run, "-o", run / "two")
    finally:
        _write(trained / "rows.jsonl", MAPPED)
    assert code == 0, err
    assert "held-out rows" not in out
    assert "a bundled text of" in out
    assert "rows.jsonl' has changed since the run" in out
    assert "held-out rows" not in (run / "two/README.md").read_text()


def test_other_rows_are_read_as_the_run_s_were(run: Path, tmp_path: Path, command: Cli) -> None:
    alike = _write(tmp_path / "alike.jsonl", MAPPED[:3])
    code, out, err = command("merge", run, "--data", alike, "-o", run / "one")
    assert (code, "of 3 alike.jsonl rows" in out) == (0, True), out + err
    plain = write_rows(tmp_path / "plain.jsonl", range(3))  # of a shape that needs no mapping
    code, out, err = command("merge", run, "--data", plain, "-o", run / "two")
    assert (code, "of 3 plain.jsonl rows" in out) == (0, True), out + err


def test_the_remedy_for_rows_of_unknown_fields_can_be_typed(run: Path, tmp_path: Path, command: Cli) -> None:
    other = _write(tmp_path / "other.jsonl", [{"q": "1 + 1?", "a": "2"}])
    for given in (run, run / "adapter"):
        code, _, err = command("merge", given, "--data", other, "-o", tmp_path / "out")
        assert code == 5, err
        assert "--fields question" not in err.partition("What to do")[2]
        assert f"how it is read: lowvram data check {other}" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def _gpt2(folder: Path, tokens_of: Path, **shape: Any) -> Path:
    """A base with learned positions, its adapter beside it."""
    tokenizer = AutoTokenizer.from_pretrained(tokens_of)
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, **{"vocab_size": len(tokenizer), **shape})
    GPT2LMHeadModel(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return save_adapter(folder / "base", Case({"target_modules": ["c_attn"]}), folder / "adapter")


def test_rows_are_cut_at_the_positions_that_a_model_has(
    byte_model: Path, tmp_path: Path, command: Cli
) -> None:
    adapter = _gpt2(tmp_path, byte_model, n_positions=64)
    long = _write(tmp_path / "long.jsonl", [{"question": "why?", "answer": "so " * 200}])
    code, out, err = command("merge", adapter, "--data", long, "-o", tmp_path / "one")
    assert (code, "of 1 long.jsonl rows" in out) == (0, True), out + err
    code, out, err = command("merge", adapter, "-o", tmp_path / "two")
    assert (code, "a bundled text of 64 tokens" in out) == (0, True), out + err


def test_tokens_that_a_model_does_not_know_are_refused_or_not_used(
    byte_model: Path, tmp_path: Path, command: Cli
) -> None:
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, "vocab_size": 50})).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", Case(), tmp_path / "adapter")
    rows = write_rows(tmp_path / "rows.jsonl", range(3))
    code, _, err = command("merge", adapter, "--data", rows, "-o", tmp_path / "one")
    assert code == 2
    assert "rows.jsonl: the tokenizer makes token 256 of its rows, and the model knows 50." in err
    assert not list(tmp_path.glob("*one*"))
    code, out, err = command("merge", adapter, "-o", tmp_path / "two")
    assert (code, "64 fixed token numbers" in out) == (0, True), out + err
    assert "the tokenizer is another model's" in out
