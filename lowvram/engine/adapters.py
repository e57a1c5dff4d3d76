"""LoRA adapters through peft, computed in the activations' dtype from float32 master weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowvram.engine.adapter_start import add_start
from lowvram.engine.config import StepConfig
from lowvram.engine.lora import lora_linear
from lowvram.engine.model import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PEFT_TASKS = {"CAUSAL_LM": "CAUSAL_LM", "SEQ2SEQ_LM": "SEQ_2_SEQ_LM"}


def _is_plain(layer: LoraLayer) -> bool:
    """No merged weights, switched-off adapters, DoRA or the like: lora_linear's formula holds."""
    return not (layer.merged or layer.disable_adapters or layer.lora_variant)


class LoraLinear4bit(PeftLinear4bit):  # type: ignore[misc]  # peft ships no types
    """peft's LoRA layer over an NF4 linear layer."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_plain(self) and not args and not kwargs:
            return lora_linear(self, x)
        result: torch.Tensor = super().forward(x, *args, **kwargs)
        return result


class LoraLinear(PeftLinear):  # type: ignore[misc]  # peft ships no types
    """peft's LoRA layer over a 16- or 32-bit linear layer."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_plain(self) and not args and not kwargs:
            return lora_linear(self, x)
        result: torch.Tensor = super().forward(x, *args, **kwargs)
        return result


def lora_config(step: StepConfig) -> LoraConfig:
    """The plan's adapter as peft's own configuration."""
    return LoraConfig(
        task_type=_PEFT_TASKS[step.task_type],
        r=step.rank,
        lora_alpha=step.alpha,
        lora_dropout=step.dropout,
        bias=step.bias,
        use_rslora=step.use_rslora,
        target_modules=list(step.target_modules),
        inference_mode=False,
    )


def add_adapters(model: PreTrainedModel, step: StepConfig) -> PeftModel:
    """Wrap `model` with trainable LoRA layers in float32; everything else is frozen."""
    import bitsandbytes as bnb

    config = lora_config(step)
    ours = {bnb.nn.Linear4bit: LoraLinear4bit, nn.Linear: LoraLinear, Conv1D: LoraLinear}
    config._register_custom_module(ours)
    config.fan_in_fan_out = any(Conv1D in (type(m), getattr(m, "source_cls", None)) for m in model.modules())
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    if step.subtracts_start:
        add_start(peft_model, DTYPES[step.compute_dtype])
    if step.levers.gradient_checkpointing and not step.levers.tiles:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return peft_model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that trains."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
