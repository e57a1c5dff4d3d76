"""Attention of one tile's queries to all keys and values so far, with gradients summed up across tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import handle_torch_function, has_torch_function

from lowvram.units import MiB

_GRADIENT_BYTES = 64 * MiB  # of keys and values that one call of attention may make, a copy per query head
_ENOUGH_ROWS = 8192  # of queries in a call: its 64 blocks of 128 keep a GPU's multiprocessors busy
_ENOUGH_HEADS = 4  # whatever the rows: a short last tile would need all for that


class KeysKnown(Exception):  # noqa: N818  # not an error: nothing else of this tile is wanted
    """Keys and values are in the buffer."""


class KeysAndValues:
    """Keys and values of one layer for the whole sequence, and the sums of their gradients.

    To a layer it is transformers' cache: `update` takes a tile's keys and values.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self.start = self.end = 0
        self.keys: torch.Tensor | None = None  # [B, K, T, D]
        self.values: torch.Tensor | None = None
        self.key_sums: torch.Tensor | None = None  # [B, K, T, D] float32 or better
        self.value_sums: torch.Tensor | None = None
        self.stops_when_known = False
        self.sums_gradients = False

    def at(self, start: int, end: int) -> None:
        """The tile that runs now."""
        self.start, self.end = start, end

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [B, K, t, D]
        """Put a tile's keys and values in their place; returns them as they came, with their history.

        Raises:
            KeysKnown: that was all that is wanted.
        """
        with torch.no_grad():
            self.keys = self._written(self.keys, key)
            self.values = self._written(self.values, value)
        if self.stops_when_known:
            raise KeysKnown
        return key, value

    def _written(self, buffer: torch.Tensor | None, tile: torch.Tensor) -> torch.Tensor:
        if buffer is None:
            batch, heads, _, width = tile.shape
            buffer = tile.new_empty((batch, heads, self._length, width))
        buffer[:, :, self.start : self.end] = tile
        return buffer

    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, K, T, D] each, of zeros at first: many small contributions need float32."""
        if self.key_sums is None or self.value_sums is None:
            assert self.keys is not None
            assert self.values is not None
            exact = torch.promote_types(self.keys.dtype, torch.float32)
            self.key_sums = torch.zeros_like(self.keys, dtype=exact)
            self.value_sums = torch.zeros_like(self.values, dtype=exact)
        return self.key_sums, self.value_sums


@dataclass(frozen=True)
class Look:
    """How queries look at keys."""

    scale: float | None
    window: int | None  # a query sees this many keys, itself included; None: all before it
    dropout: float


def tile_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: KeysAndValues, look: Look
) -> torch.Tensor:  # [B, Q, t, D], [B, K, t, D] -> [B, t, Q, D]
    """Attention of the cache's current tile, whose own keys and values are `key` and `value`."""
    result: torch.Tensor = _TileAttention.apply(query, key, value, cache, look)  # type: ignore[no-untyped-call]
    return result


class _TileAttention(torch.autograd.Function):
    """A few heads at a time, each with its own small graph, differentiated when the gradient comes."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        _key: torch.Tensor,  # in the cache already; here for its gradient
        _value: torch.Tensor,
        cache: KeysAndValues,
        look: Look,
    ) -> torch.Tensor:
        ctx.cache, ctx.low = cache, _first_key(cache, look)
        ctx.parts = []
        differentiates = any(ctx.needs_input_grad)
        batch, heads, length, _ = query.shape
        assert cache.values is not None
        output = query.new_empty((batch, length, heads, cache.values.shape[-1]))
        for keys, queries in _groups(query, cache, ctx.low):
            part = _Part.of(query, cache, keys, queries, ctx.low)
            with torch.set_grad_enabled(differentiates):
                seen = part.attend(look)
            output[:, :, part.queries] = seen.detach().transpose(1, 2)
            if differentiates:
                part.output = seen
                ctx.parts.append(part)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        cache, gradient = ctx.cache, grad_outputs[0].transpose(1, 2)  # [B, Q, t, D]
        parts, ctx.parts = ctx.parts, []
        to_query = gradient.new_empty((*gradient.shape[:-1], parts[0].query.shape[-1]))
        singles = []
        while parts:
            part = parts.pop(0)
            own, to_key, to_value = part.gradients(gradient[:, part.queries])
            to_query[:, part.queries] = own
            if cache.sums_gradients:
                for total, one in zip(cache.sums(), (to_key, to_value), strict=True):
                    total[:, part.keys, ctx.low : cache.end].add_(one)
            else:
                singles.append((to_key, to_value))
        return to_query, *_own_gradients(cache, singles), None, None


def _own_gradients(
    cache: KeysAndValues, singles: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, ...]:
    """Of the tile's own keys and values: complete, for the tiles that look back at them came before."""
    if not cache.sums_gradients:
        return tuple(torch.cat(heads, dim=1) for heads in zip(*singles, strict=True))
    own = slice(cache.start, cache.end)
    assert cache.keys is not None
    return tuple(total[:, :, own].to(cache.keys.dtype) for total in cache.sums())


@dataclass
class _Part:
    """Some key heads and the query heads that look at them, or one and some of those."""

    query: torch.Tensor  # [B, n*r, t, D]
    key: torch.Tensor  # [B, n, s, D]
    value: torch.Tensor
    queries: slice
    keys: slice
    output: torch.Tensor | None = None

    @classmethod
    def of(cls, query: torch.Tensor, cache: KeysAndValues, keys: slice, queries: slice, low: int) -> _Part:
        assert cache.keys is not None
        assert cache.values is not None
        seen = (slice(None), keys, slice(low, cache.end))
        return cls(query[:, queries].detach(), cache.keys[seen], cache.values[seen], queries, keys)

    def attend(self, look: Look) -> torch.Tensor:  # [B, n*r, t, D]
        if torch.is_grad_enabled():
            for tensor in (self.query, self.key, self.value):
                tensor.requires_grad_()
        each = self.query.shape[1] // self.key.shape[1]
        return _attend(self.query, _repeated(self.key, each), _repeated(self.value, each), look)

    def gradients(self, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert self.output is not None
        output, self.output = self.output, None
        return torch.autograd.grad(output, (self.query, self.key, self.value), gradient)


def _repeated(heads: torch.Tensor, each: int) -> torch.Tensor:  # [B, n, s, D] -> [B, n*each, s, D]
    """Each key head as often as query heads look at it; a view where there is one key head."""
    if each == 1:
        return heads
    batch, count, length, width = heads.shape
    return heads[:, :, None].expand(batch, count, each, length, width).flatten(1, 2)


def _groups(query: torch.Tensor, cache: KeysAndValues, low: int) -> list[tuple[slice, slice]]:
    """Key and query heads that go together: one call makes a gradient of keys and values per query head."""
    assert cache.keys is not None
    batch, heads, length, width = query.shape
    each = heads // cache.keys.shape[1]
    head_bytes = 2 * batch * (cache.end - low) * width * query.element_size()
    enough = min(-(-_ENOUGH_ROWS // (batch * length)), _ENOUGH_HEADS)
    count = max(_GRADIENT_BYTES // head_bytes, enough)
    if count < each and cache.sums_gradients:
        starts = [(k, q) for k in range(0, heads, each) for q in range(0, each, count)]
        return [(slice(k // each, k // each + 1), slice(k + q, k + min(q + count, each))) for k, q in starts]
    count = max(count // each, 1) * each
    ends = [(q, min(q + count, heads)) for q in range(0, heads, count)]
    return [(slice(q // each, end // each), slice(q, end)) for q, end in ends]


def _first_key(cache: KeysAndValues, look: Look) -> int:
    """The first one that the tile's first query sees."""
    return 0 if look.window is None else max(0, cache.start - look.window + 1)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, look: Look) -> torch.Tensor:
    """[B, h, t, D] queries that are the last t of s positions."""
    length, seen = query.shape[2], key.shape[2]
    options: dict[str, Any] = {"dropout_p": look.dropout, "scale": look.scale}
    if look.window is not None and look.window < seen:
        mask = window_mask(length, seen, look.window, query.device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    if length == seen:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    return last_queries_attention(query, key, value, **options)


def last_queries_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout_p: float, scale: float | None
) -> torch.Tensor:  # [B, h, t, D], [B, h, s, D] -> [B, h, t, D]
    """Causal attention of queries that are the last t of s positions; the memory trace has its own."""
    given = (query, key, value)
    if has_torch_function(given):
        traced: torch.Tensor = handle_torch_function(
            last_queries_attention, given, *given, dropout_p=dropout_p, scale=scale
        )
        return traced
    mask = _LowerRight(CausalVariant.LOWER_RIGHT, query.shape[2], key.shape[2])  # on CUDA the kernels know it
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale)


class _LowerRight(CausalBias):
    """torch's own, without its numbers: made as usual it would be [2, t, s] float32, 8 GB for the last of 60
    tiles of 4,096 tokens, which nobody reads."""

    def __new__(cls, *_args: Any) -> _LowerRight:  # as_subclass gives just that
        return torch.empty(0).as_subclass(cls)


def window_mask(
    length: int, seen: int, window: int, device: torch.device
) -> torch.Tensor:  # [t, s] True: is seen
    """Of queries that are the last `length` of `seen` positions; each sees `window` keys, itself included."""
    query = torch.arange(seen - length, seen, device=device)[:, None]
    key = torch.arange(seen, device=device)
    return (key <= query) & (key > query - window)  # not by their difference: 8 bytes for each pair
