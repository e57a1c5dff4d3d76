"""Tiny adapters as plain peft makes, saves and runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(
    base: Path, folder: Path, seed: int, *, save_embedding_layers: bool | str = "auto", **changes: Any
) -> Path:
    """A LoRA adapter of random weights that change the model's answers; with biases, those too."""
    config: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config | changes))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data = parameter.data + noise if "magnitude" in name else noise
    model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder


def alone(base: Path, adapter: Path | None) -> Any:
    """One adapter on the base as plain peft loads it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()


@torch.no_grad()
def generated(model: Any, prompt: Sequence[int], n: int, **options: Any) -> list[int]:
    """What transformers' own `generate` writes to one prompt."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, pad_token_id=0, **options
    )
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]
