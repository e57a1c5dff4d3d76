"""KV cache: keys and values of all layers in buffers of the whole context, allocated once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class FixedLayer(DynamicLayer):  # type: ignore[misc]  # transformers ships no types
    """One layer's. transformers' own copies all of them for each new token, and so has both for a moment.

    A static cache of transformers' would show attention the whole buffer, and a mask of it, from the start.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length, self._end = length, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._key_buffer, self._value_buffer = map(self._buffer, (key_states, value_states))
        self.is_initialized = True

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:  # [B, K, t, D] -> [B, K, T, D]
        return like.new_empty((*like.shape[:2], self._length, like.shape[3]))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [B, K, t, D] -> [B, K, all so far, D]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._end, self._end + key_states.shape[2]
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self.rewind(end)
        return self.keys, self.values

    def rewind(self, length: int) -> None:
        """Only the first `length` tokens count; those behind them are written over."""
        self._end = length
        self.keys, self.values = (b[:, :, :length] for b in (self._key_buffer, self._value_buffer))


def kv_cache(config: PretrainedConfig, length: int) -> DynamicCache:
    """For `length` tokens a row; a layer that sees a window only keeps that much, as transformers does it."""
    cache = DynamicCache(config=config)
    cache.layers = [FixedLayer(length) if type(one) is DynamicLayer else one for one in cache.layers]
    return cache
