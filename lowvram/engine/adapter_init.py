"""Gives the adapters the start that the plan asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowvram.engine.adapter_start import factors_of, lora_layers, set_factors
from lowvram.engine.batch import Batch
from lowvram.engine.config import GRADIENT_INITS, RANKS_TAKEN, StepConfig
from lowvram.engine.eva_init import principal_directions
from lowvram.engine.gradient_init import Backward, groups_within, lora_ga, lora_one, summed_gradients
from lowvram.engine.host import Host
from lowvram.engine.linears import is_turned
from lowvram.engine.loss import exact
from lowvram.engine.singular import largest, seed_of
from lowvram.engine.weight_init import Factors, Original, loftq, olora, pissa, weight_of
from lowvram.errors import ConfigError

_MORE = 4  # times the rank is decomposed: LoRA-GA's q
_ROUNDS = {"lora_ga": 4, "lora_one": 16}  # of power iteration, as their authors do


@dataclass(frozen=True)
class Means:
    """What an initialisation works with."""

    host: Host
    seed: int
    original: Original
    backward: Backward = torch.Tensor.backward
    room_bytes: int | None = None  # of host memory for sums of gradients; None: as much as they take
    enter: Callable[[str], None] = lambda _: None  # hears which layer is worked on
    say: Callable[[str], None] = lambda _: None


def initialise(
    model: nn.Module, loss_of: nn.Module, step: StepConfig, batches: Sequence[Batch], means: Means
) -> None:
    """Set A and B of every adapted layer, and what is subtracted of them; nothing for init=default.

    The generators that training draws from go on as if nothing had been drawn.

    Args:
        loss_of: the step's loss over `model`.
        batches: for methods that look at data; on the host.

    Raises:
        ConfigError: the rank is too large for a layer, or a gradient is not finite.
    """
    if step.init == "default":
        return
    layers = lora_layers(model)
    require_rank(step, layers)
    devices = [means.host.device] if means.host.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if step.init in GRADIENT_INITS:
            _from_gradients(loss_of, layers, step, batches, means)
        elif step.init == "eva":
            _from_inputs(loss_of, layers, step, batches, means)
        else:
            _from_weights(layers, step, means)


def require_rank(step: StepConfig, layers: dict[str, Any]) -> None:
    """Raises: ConfigError, where a layer is too narrow."""
    needed = RANKS_TAKEN[step.init] * step.rank
    for name, layer in layers.items():
        a, b = factors_of(layer)
        width = min(a.shape[1], b.shape[0])
        if width < needed:
            most = width * step.rank // needed
            raise ConfigError(
                f"init={step.init} at rank {step.rank} takes {needed} directions, and {name} has {width}.",
                f"Use --rank {most} or less." if most else "Use --init default, or other --targets.",
            )


def _from_gradients(
    loss_of: nn.Module,
    layers: dict[str, Any],
    step: StepConfig,
    batches: Sequence[Batch],
    means: Means,
) -> None:
    """A pass over the batches for each group of layers whose gradients the host can hold."""
    groups = groups_within({n: _gradient_bytes(layer) for n, layer in layers.items()}, means.room_bytes)
    tokens = sum(batch.trained_tokens for batch in batches)
    means.say(f"init {step.init}: gradients of {len(batches)} micro-batches in {_passes(len(groups))}")
    for group in groups:
        sums = summed_gradients(loss_of, layers, group, batches, means.host, means.backward)
        _drop_gradients(loss_of)
        for name in (n for n in group if n in sums):
            means.enter(name)
            gradient = means.host.to_device(sums.pop(name)).div_(tokens)  # [out, in]
            if not gradient.is_meta:
                _require_finite(name, gradient)
            set_factors(layers[name], *_of_gradient(gradient, step, seed_of(means.seed, name)))
            del gradient
    means.enter("")


def _passes(n: int) -> str:
    return "one pass" if n == 1 else f"{n} passes, for the host has no room for all layers' at once"


def _gradient_bytes(layer: Any) -> int:
    a, b = factors_of(layer)
    return 4 * a.shape[1] * b.shape[0]


def _of_gradient(gradient: torch.Tensor, step: StepConfig, seed: int) -> Factors:  # [out, in]
    found = largest(gradient, _MORE * step.rank, _ROUNDS[step.init], seed)
    return (lora_ga if step.init == "lora_ga" else lora_one)(found, step.rank)


def _require_finite(name: str, gradient: torch.Tensor) -> None:
    """Not finite in fp16 means an overflow; zero, that the layer has no part in the loss."""
    low, high = (float(value) for value in gradient.aminmax())
    if not low < high < float("inf") or low == float("-inf"):
        what = "zero" if low == high == 0 else "not finite"
        raise ConfigError(
            f"The gradient of {name} is {what}: it tells no direction.",
            "Use --init default, or other data.",
        )


def _drop_gradients(loss_of: nn.Module) -> None:
    """Of what else trains, such as biases."""
    for parameter in loss_of.parameters():
        parameter.grad = None


def _from_inputs(
    loss_of: nn.Module,
    layers: dict[str, Any],
    step: StepConfig,
    batches: Sequence[Batch],
    means: Means,
) -> None:
    means.say(f"init eva: inputs of {len(batches)} micro-batches")
    device = means.host.device
    found = principal_directions(loss_of, layers, batches, step.rank, means.seed, device)
    for name, layer in layers.items():
        means.enter(name)
        directions = found.pop(name).found()  # [r, in]
        if directions is None:
            raise ConfigError(
                f"init=eva at rank {step.rank}: no micro-batch has that many trained tokens.",
                "Use a smaller --rank, or a larger --micro-batch.",
            )
        set_factors(layer, directions, torch.zeros_like(factors_of(layer)[1]))
        del directions
    means.enter("")


def _from_weights(layers: dict[str, Any], step: StepConfig, means: Means) -> None:
    means.say(f"init {step.init}: decomposing {len(layers)} weights")
    for name, layer in layers.items():
        means.enter(name)
        set_factors(layer, *_of_weight(name, layer, step, means))
    means.enter("")


def _of_weight(name: str, layer: Any, step: StepConfig, means: Means) -> Factors:
    held = weight_of(layer.base_layer)  # [out, in]
    weight, seed = held.to(exact(held)), seed_of(means.seed, name)
    if step.init == "olora":
        return olora(weight, step.rank)
    if step.init == "pissa":
        return pissa(weight, step.rank, step.scaling, seed)
    original = means.host.to_device(means.original(name).to(held.dtype))  # as it was when it was quantised
    del held
    lost = weight.neg_().add_(original.t() if is_turned(layer.base_layer) else original)
    del original
    return loftq(lost, step.rank, step.scaling, seed)
