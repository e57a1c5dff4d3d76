"""Attention through transformers' public interface: causal without a mask tensor, padded for T5.

Right-padded causal batches need no mask: a real token never sees the padding behind it, and padding is not
trained. transformers would still look into the mask's values (which meta tensors do not have) and may build
a [T, T] mask; with this interface a mask exists only where a sliding window needs one.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowvram.engine.packing import is_packed, packed_attention
from lowvram.engine.tile_attention import Look, tile_attention

CAUSAL_ATTENTION = "lowvram_causal"
PADDED_ATTENTION = "lowvram_padded"  # T5-type: what the encoder padded stays masked
GENERATING_ATTENTION = "lowvram_generating"  # with a KV cache: rows padded on the left, or none


def mask_for_window_only(
    *, q_length: int, kv_length: int, local_size: int | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """None (the kernel's own causal mask) unless a window is shorter than the sequence: [B, 1, T, T]."""
    if local_size is None or kv_length <= local_size:
        return None
    kwargs.update(attention_mask=None, allow_is_causal_skip=False)
    mask: torch.Tensor | None = sdpa_mask(
        q_length=q_length, kv_length=kv_length, local_size=local_size, **kwargs
    )
    return mask


def mask_always(**kwargs: Any) -> torch.Tensor | None:
    """[B, 1, T, S] from the given padding mask, whatever its values: no look into them."""
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    mask: torch.Tensor | None = sdpa_mask(**kwargs)
    return mask


def mask_for_cache(*, attention_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor | None:
    """None where no row is padded and the kernel's own mask is the right one, else [B, 1, t, all so far]."""
    if attention_mask is not None:
        return mask_always(attention_mask=attention_mask, **kwargs)
    mask: torch.Tensor | None = sdpa_mask(attention_mask=None, **kwargs)
    return mask


def causal_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # [B, Q, t, D], [B, K, t, D] -> [B, t, Q, D]
    """transformers' SDPA; of a tile (engine/tiles.py) the queries look at all keys so far."""
    if is_packed(attention_mask, query):
        kwargs.update(dropout=dropout, scaling=scaling)
        return packed_attention(module, query, key, value, attention_mask, sliding_window, **kwargs), None
    cache = getattr(module, "lowvram_tile", None)
    if cache is not None:
        return tile_attention(query, key, value, cache, Look(scaling, sliding_window, dropout)), None
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output


MASKS = {
    CAUSAL_ATTENTION: mask_for_window_only,
    PADDED_ATTENTION: mask_always,
    GENERATING_ATTENTION: mask_for_cache,
}


def register() -> str:
    """Make the interfaces known to transformers; returns the causal one's name for `attn_implementation`."""
    AttentionInterface.register(CAUSAL_ATTENTION, causal_attention)
    for name in (PADDED_ATTENTION, GENERATING_ATTENTION):
        AttentionInterface.register(name, sdpa_attention_forward)
    for name, mask in MASKS.items():
        AttentionMaskInterface.register(name, mask)
    return CAUSAL_ATTENTION
