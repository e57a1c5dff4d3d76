"""Structure: what of a decoder stands against computing parts of a row apart, tiles or packed examples."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowvram.engine.recompute import layers_of

_OF_LENGTH = ("longrope", "dynamic")  # kinds of RoPE that ask how long the whole sequence is


def attention_modules(decoder: nn.Module) -> list[Any]:
    """Those that call transformers' attention interface."""
    return [m for m in decoder.modules() if hasattr(m, "is_causal")]


def why_not_apart(decoder: Any) -> str:
    """What makes this decoder more than one stack of layers with causal attention; "" where nothing does."""
    config = decoder.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = [getattr(m, "sliding_window", 0) for m in attention_modules(decoder)]
    if config.is_encoder_decoder or len(layers_of(decoder)) != config.num_hidden_layers:
        return "it is not one stack of decoder layers"
    if not decoder._supports_sdpa:
        return "its attention is not transformers' SDPA"
    if kinds - {"full_attention", "sliding_attention"}:
        return f"it has {', '.join(sorted(kinds - {'full_attention', 'sliding_attention'}))}"
    if "sliding_attention" in kinds and not all(w is None or w > 0 for w in windows):
        return "its attention does not say how wide its window is"
    if any(kind in str(getattr(config, "rope_parameters", None)) for kind in _OF_LENGTH):
        return "its position embedding depends on the sequence's length"
    return ""
