"""What an adapter starts from, where that is not zero: kept beside it, subtracted, stored and exported."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

ADAPTER = "default"  # peft's name of the one that trains
_START = ("start_a", "start_b")
_CAPTURE = "lowvram_capture"
Capture = Callable[[torch.Tensor], torch.Tensor]  # [.., in] -> [.., out]


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> adapted layer, in the order in which the model has them."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def factors_of(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A [r, in] and B [out, r]."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def add_start(model: nn.Module, dtype: torch.dtype) -> None:
    """Room for A0 and B0 in every adapted layer; zeros, which subtract nothing.

    Args:
        dtype: in which the adapter is multiplied; A and B start at values that it can hold.
    """
    for layer in lora_layers(model).values():
        for name, factor in zip(_START, factors_of(layer), strict=True):
            layer.register_buffer(name, torch.zeros_like(factor, dtype=dtype), persistent=False)


def is_start(name: str) -> bool:
    """Whether a buffer of this name is an A0 or B0."""
    return name.rpartition(".")[2] in _START


def start_of(layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A0 and B0, None for a layer that subtracts nothing."""
    return tuple(getattr(layer, name, None) for name in _START)  # type: ignore[return-value]


@torch.no_grad()
def set_factors(layer: Any, a: torch.Tensor, b: torch.Tensor) -> None:  # [r, in], [out, r]
    """A and B; where the layer subtracts its start, that too, rounded alike: their difference is 0."""
    for factor, start, value in zip(factors_of(layer), start_of(layer), (a, b), strict=True):
        factor.copy_(value if start is None else value.to(start.dtype))
        if start is not None:
            start.copy_(factor)


def difference_factors(
    a: torch.Tensor,
    b: torch.Tensor,
    a0: torch.Tensor | None,
    b0: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # twice [r, in] and [out, r] -> [r or 2r, in], [out, r or 2r]
    """Two factors whose product, the second times the first, is B A - B0 A0 (B A without a start).

    B A - B0 A0 = (B - B0) A + B0 (A - A0), with the differences taken in float32: at the start they are
    exactly zero. With [A; A0] and [B, -B0], which are the same, 16 bits would round away every step shorter
    than a 256th of what it started from.
    """
    if a0 is None or b0 is None:
        return a.to(dtype), b.to(dtype)
    down = torch.cat([a.to(dtype), (a - a0).to(dtype)])
    return down, torch.cat([(b - b0).to(dtype), b0.to(dtype)], dim=1)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that a file of the adapter holds: what trains, and a frozen A."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad or ".lora_" in name}


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> tensor of all that a resume needs: the adapter, and what it started from."""
    return {**adapter_parameters(model), **{n: b for n, b in model.named_buffers() if is_start(n)}}


@contextmanager
def saved_as_plain(model: Any) -> Iterator[dict[str, torch.Tensor] | None]:
    """While it lasts, peft's save_pretrained writes the adapter as one that subtracts nothing.

    Of rank 2r and the same scaling: its A is [A; A - A0] and its B is [B - B0, B0]. None: as it is.
    """
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    if start_of(first)[0] is None:
        yield None
        return
    own: LoraConfig = model.peft_config[ADAPTER]
    plain = copy.deepcopy(own)
    plain.r, plain.use_rslora, plain.lora_alpha = 2 * own.r, False, 2 * own.r * first.scaling[ADAPTER]
    model.peft_config[ADAPTER] = plain
    try:
        yield _plain_tensors(model, layers)
    finally:
        model.peft_config[ADAPTER] = own


def _plain_tensors(model: nn.Module, layers: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What peft looks for by name: LoRA weights, and biases."""
    tensors: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
    for name, layer in layers.items():
        a, b = factors_of(layer)
        factors = difference_factors(a, b, *start_of(layer), a.dtype)
        for side, factor in zip("AB", factors, strict=True):
            tensors[f"{name}.lora_{side}.{ADAPTER}.weight"] = factor.detach()
    return tensors


def set_capture(layer: Any, capture: Capture | None) -> None:
    """What runs instead of the layer, until it is None again."""
    vars(layer)[_CAPTURE] = capture  # past nn.Module, which would make a child of a base layer


def capture_of(layer: Any) -> Capture | None:
    found: Capture | None = vars(layer).get(_CAPTURE)
    return found
