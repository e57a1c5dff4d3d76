"""Optimizers over what trains, torch's fused AdamW or bitsandbytes' 8-bit and paged ones; their state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lowvram.engine.config import StepConfig


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], step: StepConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """The plan's optimizer; the first group has the plan's learning rate itself.

    Weight decay is on matrices only: a bias or DoRA's magnitude would be drawn to 0 and away from the base.

    Args:
        parameters: by their names in the model.
    """
    groups = _groups(parameters, step, learning_rate)
    common = {"lr": learning_rate, "weight_decay": step.weight_decay}
    if step.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **common)  # type: ignore[arg-type]
    import bitsandbytes as bnb

    kinds = {
        "adamw8bit": bnb.optim.AdamW8bit,
        "paged_adamw": bnb.optim.PagedAdamW,
        "paged_adamw8bit": bnb.optim.PagedAdamW8bit,
    }
    optimizer: torch.optim.Optimizer = kinds[step.optimizer](groups, **common)
    return optimizer


def _groups(
    parameters: Mapping[str, nn.Parameter], step: StepConfig, learning_rate: float
) -> list[dict[str, Any]]:
    """By rate and decay, the slow and the decayed first.

    LoRA+ (arXiv 2402.12354) has a higher rate for B. As in its authors' code, and in peft's, that is the rate
    of all vectors (biases, magnitudes) too. peft's create_loraplus_optimizer wants the whole model, of which
    a memory trace has twins of the parameters only, and decays DoRA's magnitudes.
    """
    found: defaultdict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():
        vector = parameter.dim() == 1
        fast = step.lora_plus_ratio != 1 and (vector or ".lora_B." in name)
        found[fast, vector and step.weight_decay > 0].append(parameter)
    return [
        {
            "params": some,
            "lr": learning_rate * (step.lora_plus_ratio if fast else 1),
            "weight_decay": 0.0 if undecayed else step.weight_decay,
        }
        for (fast, undecayed), some in sorted(found.items(), key=lambda item: item[0])
    ]


def forget_state(optimizer: torch.optim.Optimizer) -> None:
    """As before the first update, in the memory that the state has; bitsandbytes' code books stay."""
    for values in optimizer.state.values():
        for name, value in values.items():
            if not name.startswith("qmap"):
                values[name] = value.zero_() if isinstance(value, torch.Tensor) else 0


def restore_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """`saved`, a state_dict, into the state that is there: each tensor keeps its place.

    bitsandbytes' own load_state_dict brings paged state to the device, where the plan has no room for it.
    """
    if not optimizer.state:
        optimizer.load_state_dict(dict(saved))
        return
    for group, old in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, index in zip(group["params"], old["params"], strict=True):
            _restore(optimizer.state[parameter], _flat(saved["state"].get(index, {})))
        group.update({name: value for name, value in old.items() if name != "params"})


def _restore(live: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(live.get(name), torch.Tensor):
            live[name].copy_(value)
        else:
            live[name] = value


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """bitsandbytes saves its quantised tensors one level down."""
    inner = [value for value in values.values() if isinstance(value, Mapping)]
    outer = {name: value for name, value in values.items() if not isinstance(value, Mapping)}
    return {**outer, **{name: value for some in inner for name, value in some.items()}}
