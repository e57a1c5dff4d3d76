"""Packing: several examples in one row without padding, each seen by itself alone.

What a decoder layer does to a token depends on no other token, but for attention. So a row of examples laid
end to end is run as one sequence whose positions restart with each example, and attention runs example by
example. Where they lie each layer learns from its attention mask, which transformers hands on as it is given,
in forward and when a layer is computed again (keyword arguments that it does not know it mostly hands on too,
but Nemotron's layers drop them). No real mask is made but for a row with an example longer than a sliding
window.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lowvram.engine.recompute import layers_of
from lowvram.engine.structure import attention_modules, why_not_apart
from lowvram.engine.tile_attention import window_mask
from lowvram.errors import ConfigError

_REMEDY = "Leave packing off."


class PackedRow:
    """Where the examples of one row lie, and the mask that they share where a sliding window needs one."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        self._masks: dict[int, torch.Tensor] = {}  # window -> of the longest example

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """What the decoder is called with beside the row's token ids.

        The mask of one element only carries the row. It has four dimensions, so transformers takes it for
        finished: it makes none itself, [1, 1, T, T] where there is a window, and looks for no packed rows.
        """
        positions = torch.cat([torch.arange(length, device=device) for length in self.lengths])
        mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
        mask.packed_row = self  # type: ignore[attr-defined]
        return {"attention_mask": mask, "position_ids": positions[None]}  # [1, T]

    def mask(self, length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """[1, 1, t, t], a corner of the longest example's, which is made once for all layers.

        Either every example of a row has one or none has, as in a padded batch: with a mask grouped heads are
        copied out, without one they are kept as they are, and a mixed row would do both.
        """
        longest = max(self.lengths)
        if window is None or longest <= window:
            return None
        if window not in self._masks:
            self._masks[window] = window_mask(longest, longest, window, device)
        return self._masks[window][None, None, :length, :length]


def is_packed(mask: torch.Tensor | None, query: torch.Tensor) -> bool:
    """Whether `mask` is the one that carries a packed row."""
    return mask is not None and mask.numel() == 1 and query.shape[2] > 1


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    window: int | None,
    **options: Any,
) -> torch.Tensor:  # [1, Q, T, D], [1, K, T, D] -> [1, T, Q, D]
    """SDPA once for each example.

    The row is split and not sliced: the gradient of each slice would be as long as the whole row.

    Raises:
        ConfigError: the model handed on another mask than it was given.
    """
    row: PackedRow | None = getattr(mask, "packed_row", None)
    if row is None:
        raise ConfigError(f"{type(module).__name__} is not told where a packed row's examples lie.", _REMEDY)
    parts = zip(*(t.split_with_sizes(row.lengths, dim=2) for t in (query, key, value)), strict=True)
    seen = [
        sdpa_attention_forward(module, q, k, v, row.mask(q.shape[2], window, q.device), **options)[0]
        for q, k, v in parts
    ]
    return torch.cat(seen, dim=1)


def require_packable(decoder: Any) -> None:
    """Refuse a model whose examples cannot share a row.

    Raises:
        ConfigError: says what stands against it.
    """
    if refusal := why_not_packed(decoder):
        raise ConfigError(f"Examples for this model cannot be packed: {refusal}.", _REMEDY)


def why_not_packed(decoder: Any) -> str:
    """What stands against packing examples for this model; "" where nothing does."""
    if refusal := why_not_apart(decoder):
        return refusal
    mixes = any(isinstance(m, nn.Conv1d) for m in decoder.modules())  # Falcon-H1, LFM2: over neighbours
    if mixes or not all(attention_modules(layer) for layer in layers_of(decoder)):
        return "its tokens see each other outside attention"
    if "position_ids" not in inspect.signature(type(decoder).forward).parameters:
        return "it does not take positions"
    return ""
