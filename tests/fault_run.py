"""A tiny real Llama with a tokenizer of its own, its data and its plan: a run of a second that faults hit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowvram.planner.plan import Plan
from lowvram.training import checkpoint
from lowvram.training.metrics import StepRecord
from lowvram.training.run_folder import RunFolder
from tests.forked_cli import ForkedCli

_TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
_WISHES = ("--batch", "4", "--rank", "2", "--seq-len", "64", "--precision", "fp32", "--dropout", "0.1")


def save_home(folder: Path) -> Path:
    """`folder`/model and `folder`/rows.jsonl: 31 questions, so that an epoch's last step is short."""
    rows = [{"question": f"What is {i} + {i % 7}?", "answer": f"It is {i + i % 7}."} for i in range(31)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = _tokenizer([text for row in rows for text in row.values()])
    torch.manual_seed(0)
    config = LlamaConfig(
        **_TINY,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


def save_plan(cli: ForkedCli, home: Path, file: Path, **changes: Any) -> Path:
    """What `lowvram plan` saves for this model, once, edited as a user may edit it."""
    planned = home / "planned.yaml"
    if not planned.exists():
        data = ("--model", home / "model", "--data", home / "rows.jsonl")
        ended = cli.run("plan", *data, *_WISHES, "-o", planned)
        assert ended.code == 0, ended.err
    values = {"micro_batch": 2, "accumulation": 2, "warmup_steps": 2, "evaluate_every": 5, "save_every": 3}
    plan = Plan.from_yaml(planned).model_copy(update={**values, "total_steps": 12, **changes})
    file.write_text(plan.to_yaml(), encoding="utf-8")
    return file


def learned(run: Path) -> list[tuple[float, ...]]:
    """What a step computed, of every step: equal only for runs that are the same to the last bit."""
    return [_computed(record) for record in RunFolder(run).read_metrics()]


def _computed(record: StepRecord) -> tuple[float, ...]:
    held_out = -1.0 if record.held_out_loss is None else record.held_out_loss
    rate, counts = record.learning_rate, (record.step, record.tokens, record.trained_tokens)
    return (*counts, record.loss, record.grad_norm, rate, held_out)


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def saved_step(run: Path) -> int:
    """Of the newest whole checkpoint, which is read; 0 when there is none."""
    path, _ = checkpoint.newest(run / "checkpoints")
    return 0 if path is None else checkpoint.load(path).step
