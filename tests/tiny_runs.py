"""Runs of a tiny model through the command line: what they wrote, and folders as a kill would leave them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowvram.training.run_folder import RunFolder
from tests.test_pipeline import TINY, Run, run

Cli = Run
command = run  # the command line inside this process
ASKED = ("--rank", "2", "--seq-len", "128", "--batch", "4", "--micro-batch", "2", "--learning-rate", "2e-2")
_END = "<end>"


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers over 257 tokens, the bytes and an end: a step takes a tenth of one over 49,152."""
    folder = tmp_path_factory.mktemp("byte_model")
    bytes_and_end = {text: number for number, text in enumerate([*sorted(ByteLevel.alphabet()), _END])}
    tokenizer = Tokenizer(models.BPE(vocab=bytes_and_end, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = LlamaConfig(**TINY, num_hidden_layers=2, vocab_size=len(bytes_and_end), tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(file: Path, numbers: range, words: int = 6) -> Path:
    """Questions and answers of many lengths, with up to `words` words more."""
    rows = [
        {"question": f"{i} + 1?" + " please" * (i % words), "answer": "so " * (i * 5 % words) + str(i + 1)}
        for i in numbers
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learned(run: Path) -> list[tuple[Any, ...]]:
    """Of each step all that does not depend on the clock or on the machine's memory."""
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "trained_tokens")
    return [tuple(row[name] for name in (*names, "held_out_loss")) for row in metrics(run)]


def result(run: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "result.json").read_text())
    return read


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def steps_kept(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def events(run: Path, kind: str) -> list[str]:
    return [event.text for event in RunFolder(run).read_events() if event.kind == kind]


def edit_plan(file: Path, **values: object) -> None:
    """Change lines of a plan as a person would; the comments stay."""
    text = file.read_text()
    for name, value in values.items():
        text, n = re.subn(rf"(?m)^( *){name}: [^#\n]*", rf"\g<1>{name}: {value}  ", text)
        assert n == 1, name
    file.write_text(text)


def killed_after(step: int, whole: Path, copy: Path) -> Path:
    """What a run that wrote `whole` would have left, had it been killed after saving `step`.

    Later lines of metrics.jsonl stay, as if the kill had come just before the next checkpoint.
    """
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "adapter")
    for name in ("result.json", "receipt.json"):
        (copy / name).unlink()
    for later in steps_kept(copy):
        if later > step:
            shutil.rmtree(copy / "checkpoints" / f"step-{later:06d}")
    return copy
