"""peft's own LoRA-GA on a 16-bit base, for scripts/bench_adapters.py to stand beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga

from lowvram.engine.batch import Batch
from lowvram.engine.config import StepConfig


def peft_lora_ga(base: Any, step: StepConfig, batches: Sequence[Batch]) -> Any:
    """`base`, whose weights it changes, as a PeftModel initialised on `batches` in peft's default way."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=step.rank,
        lora_alpha=step.alpha,
        lora_dropout=step.dropout,
        target_modules=list(step.target_modules),
        use_rslora=step.use_rslora,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    preprocess_loraga(base, config, lambda: _gradients(base, batches))
    return get_peft_model(base, config)


def _gradients(base: Any, batches: Sequence[Batch]) -> None:
    """Of the mean loss of all trained tokens."""
    tokens = sum(batch.trained_tokens for batch in batches)
    for batch in batches:
        logits = base(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids)).logits
        rows = logits.flatten(0, 1).index_select(0, batch.positions).float()  # [N, V]
        loss = torch.nn.functional.cross_entropy(rows, batch.targets, reduction="sum") / tokens
        loss.backward()
