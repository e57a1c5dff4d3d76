"""peft's own LoRA-GA on a 16-bit base, for scripts/bench_adapters.py to stand beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga

from lowvram.engine.adapters import lora_config
from lowvram.engine.batch import Batch
from lowvram.engine.config import StepConfig


def peft_lora_ga(base: Any, step: StepConfig, batches: Sequence[Batch]) -> Any:
    """`base`, whose weights it changes, as a PeftModel initialised on `batches` in peft's default way."""
    config = lora_config(step)
    config.init_lora_weights, config.lora_ga_config = "lora_ga", LoraGAConfig()
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
