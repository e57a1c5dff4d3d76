"""Which layers are computed again in backward, and which of them keep what backward needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lowvram.engine.config import Levers
from lowvram.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layers_of(model: nn.Module) -> list[Any]:
    """The layers that transformers can compute again, in their order."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def switch_recompute(base: PreTrainedModel, levers: Levers) -> None:
    """Gradient checkpointing by transformers as the levers say; tiles recompute by themselves."""
    if levers.gradient_checkpointing and not levers.tiles:
        base.activation_checkpointing_enable({"use_reentrant": False})
    elif any(layer.gradient_checkpointing for layer in layers_of(base)):
        base.activation_checkpointing_disable()


def keep_last(base: PreTrainedModel, levers: Levers) -> None:
    """Except the last `kept_layers` from gradient checkpointing.

    The last and not the first: their backward comes at once, so what they keep is gone before the others
    make theirs again.

    Raises:
        ConfigError: that would be all of them, or more.
    """
    if not levers.gradient_checkpointing or levers.tiles:
        return
    layers = layers_of(base)
    if levers.kept_layers and levers.kept_layers >= len(layers):
        raise ConfigError(
            f"kept_layers={levers.kept_layers} leaves none of the {len(layers)} layers to be recomputed.",
            f"Use kept_layers up to {len(layers) - 1}, or gradient_checkpointing=off.",
        )
    first_kept = len(layers) - levers.kept_layers
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < first_kept
