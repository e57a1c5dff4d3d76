"""LoRA adapters through peft, computed in the activations' dtype from float32 master weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowvram.engine.adapter_start import add_start, capture_of
from lowvram.engine.biases import train_biases, why_not_all
from lowvram.engine.config import StepConfig
from lowvram.engine.dora import Dora, dora_linear, is_dora, start_magnitudes
from lowvram.engine.linears import is_turned
from lowvram.engine.lora import lora_linear
from lowvram.engine.model import DTYPES
from lowvram.engine.recompute import switch_recompute
from lowvram.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PEFT_TASKS = {"CAUSAL_LM": "CAUSAL_LM", "SEQ2SEQ_LM": "SEQ_2_SEQ_LM"}


def _formula(layer: LoraLayer) -> Callable[[LoraLayer, torch.Tensor], torch.Tensor] | None:
    """Ours; None with merged weights, switched-off adapters and the like, which peft knows how to run."""
    if capture_of(layer) is not None:  # an initialisation looks at the base, which lora_linear lets it
        return lora_linear
    if is_dora(layer):
        return dora_linear
    return None if layer.merged or layer.disable_adapters or layer.lora_variant else lora_linear


def _variant(chosen: Any) -> Any:
    return Dora() if type(chosen) is DoraLinearVariant else chosen


class LoraLinear4bit(PeftLinear4bit):  # type: ignore[misc]  # peft ships no types
    """peft's LoRA layer over an NF4 linear layer."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not args and not kwargs and (formula := _formula(self)):
            return formula(self, x)
        result: torch.Tensor = super().forward(x, *args, **kwargs)
        return result

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> Any:
        return _variant(super().resolve_lora_variant(config=config, **kwargs))


class LoraLinear(PeftLinear):  # type: ignore[misc]  # peft ships no types
    """peft's LoRA layer over a 16- or 32-bit linear layer."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not args and not kwargs and (formula := _formula(self)):
            return formula(self, x)
        result: torch.Tensor = super().forward(x, *args, **kwargs)
        return result

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> Any:
        return _variant(super().resolve_lora_variant(config=config, **kwargs))


def lora_config(step: StepConfig) -> LoraConfig:
    """The plan's adapter as peft's own configuration."""
    return LoraConfig(
        task_type=_PEFT_TASKS[step.task_type],
        r=step.rank,
        lora_alpha=step.alpha,
        lora_dropout=step.dropout,
        bias=step.bias,
        use_rslora=step.use_rslora,
        use_dora=step.use_dora,
        target_modules=list(step.target_modules),
        inference_mode=step.inference_mode,
    )


def add_adapters(model: PreTrainedModel, step: StepConfig) -> PeftModel:
    """Wrap `model` with LoRA layers in float32; what the step trains asks for gradients, nothing else does.

    Raises:
        ConfigError: not all biases of this model can train.
    """
    if step.bias == "all" and (refusal := why_not_all(model)):
        raise ConfigError(f"bias=all: not for this model, {refusal}.", "Use bias=lora_only or none.")
    config = with_our_layers(model, lora_config(step))
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    for name, parameter in peft_model.named_parameters():
        if step.inference_mode or (step.freeze_a and ".lora_A." in name):
            parameter.requires_grad_(False)
    train_biases(peft_model)
    if step.subtracts_start:
        add_start(peft_model, DTYPES[step.compute_dtype])
    if not any(parameter.is_meta for parameter in peft_model.parameters()):
        start_magnitudes(peft_model)
    switch_recompute(model, step.levers)
    return peft_model


def with_our_layers(model: PreTrainedModel, config: LoraConfig) -> LoraConfig:
    """`config`, of whose layers peft makes ours."""
    import bitsandbytes as bnb

    ours = {bnb.nn.Linear4bit: LoraLinear4bit, nn.Linear: LoraLinear, Conv1D: LoraLinear}
    config._register_custom_module(ours)
    config.fan_in_fan_out = any(map(is_turned, model.modules()))
    return config


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that trains."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
