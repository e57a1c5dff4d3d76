"""An optimizer's state: made by a proof and forgotten, restored where it lies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lowvram.engine.config import StepConfig
from lowvram.engine.optimizer import forget_state, make_optimizer, restore_state

KINDS = ("adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit")


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Callable[[], tuple[dict[str, nn.Parameter], Any]]:
    """A large matrix, whose state is in 8 bits, a small one and a vector, with their optimizer."""

    def made() -> tuple[dict[str, nn.Parameter], Any]:
        torch.manual_seed(0)
        shapes = {"a.lora_A.weight": (8, 1024), "a.lora_B.weight": (64, 8), "a.bias": (64,)}
        parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
        step = StepConfig(optimizer=request.param, weight_decay=0.1, lora_plus_ratio=4.0)
        return parameters, make_optimizer(parameters, step, learning_rate=1e-2)

    return made


def train(parameters: dict[str, nn.Parameter], optimizer: Any, seed: int, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def places(optimizer: Any) -> list[int]:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [value.data_ptr() for value in values if isinstance(value, torch.Tensor)]


def assert_same(ours: dict[str, nn.Parameter], theirs: dict[str, nn.Parameter]) -> None:
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=0)


def test_a_forgotten_state_is_a_fresh_one(make: Callable[[], tuple[dict[str, nn.Parameter], Any]]) -> None:
    fresh, fresh_optimizer = make()
    train(fresh, fresh_optimizer, seed=1)
    used, optimizer = make()
    before = {name: parameter.detach().clone() for name, parameter in used.items()}
    train(used, optimizer, seed=2)
    made = places(optimizer)
    with torch.no_grad():
        for name, parameter in used.items():
            parameter.copy_(before[name])
    forget_state(optimizer)
    assert places(optimizer) == made
    train(used, optimizer, seed=1)
    assert_same(used, fresh)


def test_a_restored_state_stays_where_it_was(
    make: Callable[[], tuple[dict[str, nn.Parameter], Any]],
) -> None:
    """bitsandbytes' own load_state_dict makes new tensors, on the device even where they were paged."""
    whole, whole_optimizer = make()
    train(whole, whole_optimizer, seed=1)
    saved = copy.deepcopy(whole_optimizer.state_dict())
    values = {name: parameter.detach().clone() for name, parameter in whole.items()}
    train(whole, whole_optimizer, seed=2)

    resumed, optimizer = make()
    train(resumed, optimizer, seed=3)  # as a proof does
    made = places(optimizer)
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.copy_(values[name])
    restore_state(optimizer, saved)
    assert places(optimizer) == made
    train(resumed, optimizer, seed=2)
    assert_same(resumed, whole)


def test_without_a_state_it_is_loaded(make: Callable[[], tuple[dict[str, nn.Parameter], Any]]) -> None:
    whole, whole_optimizer = make()
    train(whole, whole_optimizer, seed=1)
    resumed, optimizer = make()
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.copy_(whole[name])
    restore_state(optimizer, copy.deepcopy(whole_optimizer.state_dict()))
    train(whole, whole_optimizer, seed=2)
    train(resumed, optimizer, seed=2)
    assert_same(resumed, whole)
