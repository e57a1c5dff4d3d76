"""What our formulas assume about kernels, one by one: assumed beside measured bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_check_rows import Row
from torch import nn

from lowvram.memory.kernels import cublas_bytes, hidden_bytes

Emit = Callable[[Row], None]
_ROWS = (512, 1024, 2048)
_WEIGHTS = {"Qwen2-7B q_proj": (3584, 3584), "Qwen2-7B down_proj": (3584, 18944)}  # [out, in]
_FLASH_BACKWARD = "aten._scaled_dot_product_flash_attention_backward.default"


def micro_checks(emit: Emit) -> None:
    """cuBLAS first, since its workspaces are made by a process's first matrix products."""
    for check in (_cublas, _gemm_4bit, _flash_backward, _chosen_attention, _dropout):
        try:
            check(emit)
        except Exception as error:  # one kernel that this GPU lacks must not hide the others
            text = (str(error).strip().splitlines() or [""])[0][:200]
            row = Row(check=check.__name__.strip("_"), outcome="failed")
            emit(row.model_copy(update={"note": f"{type(error).__name__}: {text}"}))


def _spent(run: Callable[[], Any]) -> tuple[Any, int, int]:
    """What `run` returns, the bytes that it leaves allocated, and those that lived only within it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    return result, kept, torch.cuda.max_memory_allocated() - before - kept


def _cublas(emit: Emit) -> None:
    """One workspace for the forward's thread and one for autograd's; what a bias adds."""
    a, b = (torch.ones(256, 256, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(2))
    bias = torch.ones(256, device="cuda", dtype=torch.float16)
    matrix = 256 * 256 * 2
    first, second = cublas_bytes(torch.cuda.get_device_capability(0))
    product, kept, _ = _spent(lambda: a @ b)
    forward = kept - matrix
    emit(_row("cublas", first, forward, "workspace after the process's first product"))
    _, kept, _ = _spent(lambda: product.sum().backward())
    backward = kept - 2 * matrix  # both gradients stay
    emit(_row("cublas", second, backward, "workspace of autograd's thread"))
    emit(_row("cublas", first + second, forward + backward, "all workspaces"))
    _, kept, _ = _spent(lambda: F.linear(a.detach(), b.detach(), bias))
    emit(_row("cublas", 0, kept - matrix, "more after the first linear with bias (cuBLASLt)"))


def _gemm_4bit(emit: Emit) -> None:
    """What bitsandbytes' product dequantises inside; assumed at every number of rows."""
    import bitsandbytes as bnb

    for name, (out, width) in _WEIGHTS.items():
        weight = torch.randn(out, width, device="cuda", dtype=torch.bfloat16)
        packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cuda")
        del weight
        for rows in _ROWS:
            x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            state = packed.quant_state
            assumed = hidden_bytes("bitsandbytes.gemm_4bit.default", (x, packed, (out, width)), "cuda")
            _, _, hidden = _spent(lambda x=x, s=state, p=packed: bnb.matmul_4bit(x, p, quant_state=s))
            emit(_row("gemm_4bit", assumed, hidden, f"{name}, {rows} rows"))


def _heads(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Qwen2-7B's query, key and value: 28 and 4 heads of 128."""
    shapes = [(1, n, length, 128) for n in (28, 4, 4)]
    q, k, v = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes)
    return q, k, v


def _flash_backward(emit: Emit) -> None:
    """FlashAttention-2's buffers within its backward."""
    for length in _ROWS:
        q, k, v = (t.detach() for t in _heads(length))
        out, lse, cq, ck, mq, mk, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, True
        )
        grad = torch.ones_like(out)
        args = (grad, q, k, v, out, lse, cq, ck, mq, mk, 0.0, True, seed, offset)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
        _, _, hidden = _spent(lambda f=backward, a=args: f(*a))
        emit(
            _row("attention", hidden_bytes(_FLASH_BACKWARD, args, "cuda"), hidden, f"flash, {length} tokens")
        )


def _chosen_attention(emit: Emit) -> None:
    """The same through the function that models call: torch may choose another kernel than flash."""
    for length in _ROWS:
        q, k, v = _heads(length)
        kind = int(torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True))
        name = nn.attention.SDPBackend(kind).name.lower()
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        grad = torch.ones_like(out)
        _, _, hidden = _spent(lambda o=out, g=grad: o.backward(g))
        assumed = hidden_bytes(_FLASH_BACKWARD, (grad, q, k), "cuda")
        emit(_row("attention", assumed, hidden, f"chosen: {name}, {length} tokens"))


def _dropout(emit: Emit) -> None:
    """CUDA's dropout keeps a mask of one byte an element."""
    drop, x = (
        nn.Dropout(0.05),
        torch.randn(2048, 3584, device="cuda", dtype=torch.bfloat16, requires_grad=True),
    )
    out, kept, _ = _spent(lambda: drop(x))
    emit(_row("dropout", x.numel(), kept - out.numel() * out.element_size(), "mask of 2048 x 3584"))


def _row(check: str, assumed: int, measured: int, note: str) -> Row:
    return Row(check=check, assumed_bytes=assumed, measured_bytes=measured, note=note)
