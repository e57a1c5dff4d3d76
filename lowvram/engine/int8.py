"""Weights as int8 rows with one scale each: made, read back, and multiplied with by a frozen linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

_MOST = 127
_AT_ONCE = 1 << 23  # weights that are in float32 at one time while they are quantised: 34 MB


def quantized_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # [n, in] -> [n, in], [n, 1]
    """Row-wise absmax int8: q = round(w / s), w' = q * s with s = max |w| / 127 of a row.

    s is kept in float32 but rounded to the weight's own dtype first, so that reading it back costs no
    further error. bitsandbytes' int8_vectorwise_quant takes nothing but float16 on a GPU.
    """
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty((weight.shape[0], 1), dtype=torch.float32, device=weight.device)
    n_rows = max(_AT_ONCE // weight.shape[1], 1)
    for start in range(0, weight.shape[0], n_rows):
        some = slice(start, start + n_rows)
        _quantize(weight[some], values[some], scale[some])
    return values, scale


def _quantize(weight: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> None:  # 2x [v, in], [v, 1]
    """Into `values` and `scale`."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    low, high = weight.aminmax(dim=1, keepdim=True)  # |w| would be another copy
    scale.copy_((torch.maximum(high, -low).to(exact) / _MOST).to(weight.dtype))
    divisor = torch.where(scale == 0, 1.0, scale).to(exact)  # a row of zeros stays one
    values.copy_(weight.to(exact, copy=True).div_(divisor).round_().clamp_(-_MOST, _MOST))


def row_values(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 [n, in], float32 [n, 1] -> [n, in] in `dtype`, which takes 2 bytes a weight in 16 bits."""
    factor = scale.to(dtype)
    if values.is_cuda:  # one kernel that reads 1 byte a weight and writes 2; a CPU's would make a cast copy
        return values * factor
    return values.to(dtype).mul_(factor)


class Int8Linear(nn.Linear):
    """A frozen linear layer of 8 bits a weight and 32 a row, made without weights on the meta device.

    Only the weight is int8; what it is multiplied with stays in the compute dtype. LLM.int8() (arXiv
    2208.07339) quantises the activations as well, all but the columns with outliers: how many those are
    depends on the data, so that a trace could not know its shapes.
    """

    _is_hf_initialized = True  # or transformers would draw what a file lacks, which int8 cannot; load refuses

    def __init__(self, n_in: int, n_out: int, *, bias: bool, compute_dtype: torch.dtype) -> None:
        super().__init__(n_in, n_out, bias=bias, device="meta", dtype=compute_dtype)
        self.compute_dtype = compute_dtype
        self.keep(
            torch.empty((n_out, n_in), dtype=torch.int8, device="meta"),
            torch.empty((n_out, 1), dtype=torch.float32, device="meta"),
        )

    def keep(self, values: torch.Tensor, scale: torch.Tensor) -> None:  # [out, in], [out, 1]
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def fill(self, weight: torch.Tensor) -> None:  # [out, in]
        """Quantise `weight` where it lies."""
        self.keep(*quantized_rows(weight))

    def values(self) -> torch.Tensor:  # [out, in]
        """The weight as the products see it."""
        return row_values(self.weight, self.scale, self.compute_dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # [.., in] -> [.., out]
        product: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.scale, self.bias, self.compute_dtype
        )
        return product


class _Product(torch.autograd.Function):
    """x W^T for a W that exists only while a product runs; kept for backward are the int8 rows themselves.

    F.linear over a dequantised W would keep it: 13 GB of Qwen2-7B instead of 6.5.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:  # [.., in], [out, in], [out, 1], [out] -> [.., out]
        ctx.save_for_backward(values, scale)
        ctx.dtype = x.dtype  # `dtype`, but for fp16's autocast, which hands on float32 from LayerNorm
        y = F.linear(x.to(dtype), row_values(values, scale, dtype))
        return y if bias is None else y.add_(bias)  # F.linear's own makes y a view, for LoRA to copy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        values, scale = ctx.saved_tensors
        grad = grad_outputs[0]  # [.., out]
        return (grad @ row_values(values, scale, grad.dtype)).to(ctx.dtype), None, None, None, None
