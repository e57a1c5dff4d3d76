"""Biases that train: float32 masters, cast to the activations' dtype where they are added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lowvram.engine.linears import is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def n_biases(model: nn.Module) -> int:
    """Numbers in all biases, as peft's bias="all" finds them: by their name."""
    return sum(p.numel() for name, p in model.named_parameters() if _is_bias(name))


def why_not_all(model: PreTrainedModel) -> str:
    """What keeps all biases of this model from training; "" where nothing does."""
    head = model.get_output_embeddings()
    for name, _ in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if not _is_bias(name) or type(module) is nn.LayerNorm:
            continue
        if module is head:
            return "its head has a bias, and the loss makes no gradient for the head"
        if not is_linear(module):
            return f"its {type(module).__name__} has a bias and is no linear layer and no plain LayerNorm"
    return ""


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def train_biases(model: nn.Module) -> None:
    """Make float32 masters of those biases that peft has set to train.

    A step of 2e-4 does not move a bfloat16 of size 1, whose neighbours are 4e-3 and 8e-3 away. And a plain
    Linear4bit casts a float32 bias to its activations' dtype for good, whenever it runs.
    """
    for module in list(model.modules()):
        bias = dict(module.named_parameters(recurse=False)).get("bias")
        if bias is None or not bias.requires_grad:
            continue
        held: Any = module
        held.bias = nn.Parameter(bias.detach().to(torch.promote_types(bias.dtype, torch.float32)))
        held.forward = _Norm(held) if isinstance(module, nn.LayerNorm) else _Linear(held)


class _Norm:
    """A LayerNorm's forward with its bias cast."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # [.., H] -> [.., H]
        m = self._module
        return F.layer_norm(x, m.normalized_shape, m.weight, m.bias.to(m.weight.dtype), m.eps)


class _Linear:
    """A linear layer's forward with its bias added apart."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # [.., in] -> [.., out]
        return plus_bias(product_of(self._module, x), self._module.bias)


def product_of(linear: Any, x: torch.Tensor) -> torch.Tensor:  # [.., in] -> [.., out]
    """x W^T as the layer's own kernel makes it, without its bias."""
    if isinstance(linear, Conv1D):  # which cannot do without
        product: torch.Tensor = x @ linear.weight
        return product
    bias = linear.bias
    linear.bias = None
    try:
        made: torch.Tensor = type(linear).forward(linear, x)
    finally:
        linear.bias = bias
    return made


def plus_bias(product: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # [.., out], [out]
    """Added in place: nothing keeps its own product for backward."""
    if bias is None:
        return product
    result: torch.Tensor = _Plus.apply(product, bias)  # type: ignore[no-untyped-call]
    return result


class _Plus(torch.autograd.Function):
    """product + bias, in place.

    bitsandbytes' own gradient of a bias sums the first dimension only and hands autograd [T, out].
    """

    @staticmethod
    def forward(ctx: Any, product: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(product)
        ctx.dtype = bias.dtype
        return product.add_(bias.to(product.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        grad = grad_outputs[0]
        if not ctx.needs_input_grad[1]:
            return grad, None
        return grad, summed(grad.reshape(-1, grad.shape[-1]), ctx.dtype)


def summed(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:  # [T, n] -> [n]
    """Over the tokens, in float32 inside; only a CPU rounds it to the rows' dtype on the way out.

    A GPU's kernel writes float32 itself (fp16 under a scaled loss would overflow), a CPU's would first make a
    cast copy of all rows.
    """
    return rows.sum(0, dtype=dtype) if rows.is_cuda else rows.sum(0).to(dtype)
