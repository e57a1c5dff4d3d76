"""Fake weights: the engine's model with tensors that have shapes and storages but no bytes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram.engine.adapters import add_adapters
from lowvram.engine.batch import Batch
from lowvram.engine.config import StepConfig
from lowvram.engine.model import NESTED_BLOCK, NF4_BLOCK, skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def fake_model(config: PretrainedConfig, step: StepConfig, mode: FakeTensorMode) -> PeftModel:
    """The model that would be trained, adapters included, on fake cpu tensors of `mode`.

    Fake *cpu*, because fake cuda tensors with autograd abort a CPU-only torch, and on meta attention takes
    the quadratic path.
    """
    model = add_adapters(skeleton(config, step), step)
    shared: dict[int, torch.Tensor] = {}  # tied weights stay one storage
    with mode:
        for module in model.modules():
            _fake_tensors(module, shared)
    return model.train()


def _fake_tensors(module: nn.Module, shared: dict[int, torch.Tensor]) -> None:
    import bitsandbytes as bnb

    quantized = isinstance(module, bnb.nn.Linear4bit)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if quantized and name == "weight":
            _fake_nf4_weight(module)
        elif id(parameter) in shared:
            setattr(module, name, shared[id(parameter)])
        else:
            fake = nn.Parameter(_empty_like(parameter), requires_grad=parameter.requires_grad)
            shared[id(parameter)] = fake
            setattr(module, name, fake)
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, _empty_like(buffer))


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _fake_nf4_weight(module: Any) -> None:
    """Packed weight, scales and (double quantisation) scales of scales, as bitsandbytes stores them."""
    from bitsandbytes.functional import QuantState

    old = module.weight
    n_weights = old.shape[0] * old.shape[1]
    n_blocks = math.ceil(n_weights / NF4_BLOCK)
    nested = old.compress_statistics
    state2 = None
    if nested:
        state2 = QuantState(
            absmax=torch.empty(math.ceil(n_blocks / NESTED_BLOCK), dtype=torch.float32),
            code=torch.empty(256, dtype=torch.float32),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
    packed: Any = nn.Parameter(torch.empty(((n_weights + 1) // 2, 1), dtype=torch.uint8), requires_grad=False)
    packed.quant_state = QuantState(
        absmax=torch.empty(n_blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=old.shape,
        code=torch.empty(16, dtype=torch.float32),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=module.compute_dtype,
        offset=torch.empty((), dtype=torch.float32) if nested else None,
        state2=state2,
    )
    module.weight = packed


def fake_batch(step: StepConfig, mode: FakeTensorMode) -> Batch:
    """A micro-batch of the plan's full shape in which every token is trained: the worst case."""
    rows, length = step.micro_batch, step.seq_len
    trained = rows * (length - 1)
    with mode:
        return Batch(
            torch.zeros((rows, length), dtype=torch.int64),
            torch.zeros(trained, dtype=torch.int64),
            torch.zeros(trained, dtype=torch.int64),
        )
