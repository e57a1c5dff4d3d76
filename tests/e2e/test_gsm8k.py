"""The main job on the real SmolLM2 in NF4 and on real data, through the real command line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lowvram.data.tokens import cut
from lowvram.engine.source import ModelSource
from lowvram.planner.plan import Plan
from lowvram.training.data import prepare
from tests.conftest import GSM8K

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_file(), reason="shared/ is not beside this checkout")
def test_gsm8k_sixty_steps(lowvram: Cli, smollm: Path, tmp_path: Path) -> None:
    """60 steps lower the held-out loss by a quarter; adapter and merged model reload with plain libraries."""
    run = tmp_path / "run"
    asked = ("--steps", "60", "--precision", "nf4", "--output", run)
    done = lowvram("auto", "--model", smollm, "--data", GSM8K, *asked)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 60
    assert result["held_out_loss_after"] <= 0.75 * result["held_out_loss_before"], result
    merged = lowvram("merge", run)
    assert merged.returncode == 0, merged.stderr
    _plain_peft_gives_the_same_loss(smollm, run, result["held_out_loss_after"])
    _merged_agrees(smollm, run)


def _plain_peft_gives_the_same_loss(smollm: Path, run: Path, expected: float) -> None:
    plan = Plan.from_yaml(run / "plan.yaml")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[plan.compute_dtype]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        smollm, dtype=dtype, quantization_config=nf4, device_map="cpu"
    )
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    total, count = 0.0, 0
    for example in prepare(str(GSM8K), ModelSource(str(smollm))).held_out:
        kept = cut(example, plan.seq_len)
        assert kept is not None
        labels = torch.tensor([i if t else -100 for i, t in zip(kept.input_ids, kept.trained, strict=True)])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(kept.input_ids)])).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    assert total / count == pytest.approx(expected, rel=0.02)  # bf16, other batches and kernels


def _merged_agrees(smollm: Path, run: Path) -> None:
    """Merged weights against base + adapter in float32: only the rounding to bf16 differs."""
    base = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    ids = torch.tensor([ModelSource(str(smollm)).tokenizer("What is 12 times 12? Let us see.")["input_ids"]])
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, run / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)(ids).logits
    change, error = (adapted - plain).norm(), (merged - adapted).norm()
    assert change > 1
    assert error < 0.2 * change  # an unmerged base would give 1.0
