"""What a GGUF says of a model's shape, its positions and its attention, from transformers' config."""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType

from lowvram.errors import ConfigError
from lowvram.export.gguf_architectures import MERGE_INSTEAD, Architecture

_YARN_KEYS = {"original_max_position_embeddings", "beta_fast", "beta_slow"}
_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", *_YARN_KEYS},
}


def head_dim(config: Any) -> int:
    """Features of one head; some configs leave it out."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def add_hyperparameters(writer: GGUFWriter, config: Any, architecture: Architecture) -> list[str]:
    """The keys that llama.cpp reads a model's shape from; what it will do otherwise than transformers.

    Raises:
        ConfigError: positions scaled in a way that llama.cpp does not know.
    """
    rope = rope_of(config)
    width = head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    _add_scaling(writer, rope)
    return _add_windows(writer, config, architecture.arch)


def rope_of(config: Any) -> dict[str, Any]:
    """The rotation of the layers that see all, `rope_type` among it.

    Raises:
        ConfigError: of a type, or with a setting, that llama.cpp does not know.
    """
    rope = dict(config.rope_parameters)
    rope = dict(rope.get("full_attention", rope))
    kind = rope.setdefault("rope_type", "default")
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    known = _KEYS.get(kind, set()) | {"rope_type", "type", "rope_theta"}
    odd = sorted(key for key, value in rope.items() if key not in known and value is not None)
    if kind not in _KEYS or odd:
        raise ConfigError(
            f"llama.cpp does not know rope type {kind!r} with {odd or 'its settings'}.", MERGE_INSTEAD
        )
    return rope


def _add_scaling(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        if rope.get("beta_fast"):
            writer.add_rope_scaling_yarn_beta_fast(float(rope["beta_fast"]))
        if rope.get("beta_slow"):
            writer.add_rope_scaling_yarn_beta_slow(float(rope["beta_slow"]))


def _add_windows(writer: GGUFWriter, config: Any, arch: MODEL_ARCH) -> list[str]:
    """Gemma's windows and caps; what is lost of a window where llama.cpp has none."""
    window = getattr(config, "sliding_window", None)
    if arch in (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3):
        writer.add_sliding_window(window)
        if config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if arch == MODEL_ARCH.GEMMA3:
            writer.add_rope_freq_base_swa(float(config.rope_parameters["sliding_attention"]["rope_theta"]))
        return []
    if window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        return [
            f"llama.cpp has no window for this model: past {window:,} tokens it sees more than was trained."
        ]
    return []


def rope_factors(config: Any) -> torch.Tensor | None:  # [head_dim / 2]
    """By what Llama 3.1 divides each frequency (its release, section "RoPE scaling"); None without.

    Waves shorter than the high limit stay, those longer than the low one are divided by `factor`, and between
    the two the division grows smoothly.
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    width, context = head_dim(config), rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    powers = torch.arange(0, width, 2, dtype=torch.float64) / width
    waves = 2 * math.pi * float(rope["rope_theta"]) ** powers  # tokens of one turn
    kept = ((context / waves - low) / (high - low)).clamp(0, 1)
    factors: torch.Tensor = 1 / ((1 - kept) / rope["factor"] + kept)
    return factors.float()
