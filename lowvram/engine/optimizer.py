"""Optimizers over the adapter's parameters: torch's fused AdamW or bitsandbytes' 8-bit ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lowvram.engine.config import StepConfig


def make_optimizer(
    parameters: Iterable[nn.Parameter], step: StepConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """The plan's optimizer. Weight decay is on matrices only: LoRA trains no norms or biases."""
    common = {"lr": learning_rate, "weight_decay": step.weight_decay}
    if step.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **common)  # type: ignore[arg-type]
    import bitsandbytes as bnb

    kinds = {"adamw8bit": bnb.optim.AdamW8bit, "paged_adamw8bit": bnb.optim.PagedAdamW8bit}
    optimizer: torch.optim.Optimizer = kinds[step.optimizer](parameters, **common)
    return optimizer
