"""What kernels allocate inside one operator, where no dispatcher can see it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from lowvram.engine.model import NF4_BLOCK
from lowvram.units import MiB

Backend = Literal["cuda", "cpu"]

CUBLAS_WORKSPACE_BYTES = 8_519_680  # torch's default :4096:2:16:8 before sm_90
CUBLAS_WORKSPACE_BYTES_SM90 = 32 * MiB
CUBLAS_WORKSPACES = 2  # one handle for the forward's thread, one for autograd's


def hidden_bytes(func: Any, args: tuple[Any, ...], backend: Backend) -> int:
    """Bytes that exist only while `func` runs, beyond its inputs and outputs."""
    name = func.name() if hasattr(func, "name") else str(func)
    if name == "bitsandbytes::gemm_4bit":
        return _dequantized_bytes(args)
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward" and backend == "cuda":
        return _flash_backward_bytes(query=args[1], key=args[2])
    return 0


def _dequantized_bytes(args: tuple[Any, ...]) -> int:
    """bitsandbytes' gemm_4bit dequantises the whole weight above about 1,536 rows (fewer on newer cards).

    Counted always: N*K values of the activation's dtype and the float32 scales, before and after the offset.
    """
    activation, _, (rows, columns) = args[0], args[1], args[2]
    scales = 2 * 4 * math.ceil(rows * columns / NF4_BLOCK)
    return int(rows * columns * activation.element_size() + scales)


def _flash_backward_bytes(query: torch.Tensor, key: torch.Tensor) -> int:
    """FlashAttention-2's backward: a float32 dQ accumulator, row sums, and K/V gradients per query head.

    query [B, Hq, T, D], key [B, Hkv, S, D]; T is rounded to 128 rows and D to 32 columns
    (torch, aten/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd).
    """
    batch, heads, rows, width = query.shape
    rounded_rows, rounded_width = math.ceil(rows / 128) * 128, math.ceil(width / 32) * 32
    accumulator = batch * heads * rounded_rows * (rounded_width + 1) * 4
    expanded = 0
    if key.shape[1] != heads:
        expanded = 2 * batch * heads * key.shape[2] * width * query.element_size()
    return int(accumulator + expanded)


def cublas_bytes(capability: tuple[int, int] | None) -> int:
    """Workspaces that cuBLAS keeps for the life of the process."""
    per_handle = CUBLAS_WORKSPACE_BYTES_SM90 if capability and capability[0] >= 9 else CUBLAS_WORKSPACE_BYTES
    return CUBLAS_WORKSPACES * per_handle
