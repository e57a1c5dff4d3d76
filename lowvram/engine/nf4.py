"""NF4 linear layers: bitsandbytes' Linear4bit, made without weights and filled from a 16-bit one."""

from __future__ import annotations

from typing import Any

import torch


def nf4_linear(
    n_in: int, n_out: int, *, bias: bool, compute_dtype: torch.dtype, double_quantization: bool
) -> Any:
    """A layer on the meta device; its weight is filled later."""
    import bitsandbytes as bnb

    return bnb.nn.Linear4bit(
        n_in,
        n_out,
        bias=bias,
        compute_dtype=compute_dtype,
        compress_statistics=double_quantization,
        quant_type="nf4",
        device="meta",
    )


def fill_nf4(linear: Any, weight: torch.Tensor) -> None:  # [out, in]
    """Quantise `weight` where it lies, as transformers' loader does; on the meta device it stays as it is."""
    import bitsandbytes as bnb

    marks = linear.weight.__dict__
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, **marks).to(weight.device)


def nf4_values(linear: Any) -> torch.Tensor:  # [out, in]
    """The weight in the dtype that it was quantised from."""
    from bitsandbytes.functional import dequantize_4bit

    values: torch.Tensor = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return values
