"""Station: stands before a layer's own forward, to learn how transformers calls it and to call it again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Tile:
    """Tokens `start` to `end` of every row, and how transformers calls each layer for them."""

    index: int
    start: int
    end: int
    calls: list[dict[str, Any]] = field(repr=False)  # their tensors (RoPE's tables, positions) by number


@dataclass(frozen=True)
class Numbered:
    """Stands for a tensor of a layer's call."""

    number: int


class Station:
    """Stands before a layer's own forward: lets a call through, or notes it down and returns its input."""

    def __init__(self, layer: nn.Module) -> None:
        self._forward = layer.forward
        self._signature = inspect.signature(layer.forward)
        names = self._signature.parameters
        self.hidden_name = next(iter(names))
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.noted: list[dict[str, Any]] | None = None
        self.answer: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.noted is None:
            if callable(fetch := kwargs.get(self.hidden_name)):
                kwargs = fetch(kwargs)
            return self._forward(*args, **kwargs)
        call = dict(self._signature.bind(*args, **kwargs).arguments)
        hidden = call.pop(self.hidden_name)
        if "attention_mask" in call:
            call["attention_mask"] = None  # ours knows what a tile may see
        self.noted.append({**call.pop("kwargs", {}), **call})
        return hidden if self.answer is None else self.answer


def station_of(layer: Any) -> Station:
    """The layer's own: a second decoder over the same layers finds the first one's."""
    if not isinstance(layer.forward, Station):
        layer.forward = Station(layer)
    station: Station = layer.forward
    return station


def numbered_in(value: Any, found: list[torch.Tensor]) -> Any:
    """`value` with its tensors, which are added to `found`, replaced by numbers."""
    if isinstance(value, torch.Tensor):
        at = next((i for i, other in enumerate(found) if other is value), len(found))
        if at == len(found):
            found.append(value)
        return Numbered(at)
    return tuple(numbered_in(v, found) for v in value) if isinstance(value, tuple) else value


def with_tensors(value: Any, tensor: Callable[[int], torch.Tensor]) -> Any:
    if isinstance(value, Numbered):
        return tensor(value.number)
    return tuple(with_tensors(v, tensor) for v in value) if isinstance(value, tuple) else value
