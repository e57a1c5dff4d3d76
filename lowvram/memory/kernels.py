"""The kernels that a device would choose, and what they allocate inside where no dispatcher can see it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import CausalVariant
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowvram.engine.attention import MASKS
from lowvram.engine.model import NF4_BLOCK
from lowvram.engine.tile_attention import last_queries_attention
from lowvram.memory.trace import Backend, Capability
from lowvram.units import MiB

CUBLAS_WORKSPACE_BYTES = 8_519_680  # torch's default :4096:2:16:8 before sm_90
CUBLAS_WORKSPACE_BYTES_SM90 = 32 * MiB
_MOST_SPLITS = 128  # of the keys
_MOST_SPLIT_BLOCKS = 154  # 0.8 of 192 multiprocessors
CUBLAS_WORKSPACES = 2  # one handle for the forward's thread, one for autograd's


def choose_kernels(model: Any, backend: Backend, capability: Capability) -> None:
    """Give the traced model the attention and dropout kernels of `backend`.

    On meta tensors torch would take attention's quadratic path and dropout's three separate operators;
    a device takes one fused kernel for each.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    chosen = base.config._attn_implementation
    if chosen != "eager":  # whose operators are traced as they are
        base.set_attn_implementation(_traced_attention(chosen, backend, capability))
    dropout = _FusedDropout if backend == "cuda" else _CpuDropout
    for module in list(base.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout and child.p > 0:
                setattr(module, name, dropout(child.p))


class _CpuDropout(nn.Dropout):
    """A CPU's dropout; LoRA keeps what it dropped, which a GPU draws again."""

    redraws = False


class _FusedDropout(nn.Dropout):
    """CUDA's dropout: one kernel that keeps a mask of one byte an element."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # nn.Dropout's own name for it
        return torch.native_dropout(input, self.p, self.training)[0]


def _traced_attention(chosen: str, backend: Backend, capability: Capability) -> str:
    """Register the model's attention function with SDPA replaced by the kernel SDPA would pick."""
    name = f"{chosen}_traced_{backend}_{'fused' if _has_flash(backend, capability) else 'turing'}"
    own: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[chosen]

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with sdpa_of(backend, capability):
            return own(module, *args, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, MASKS[chosen])
    return name


def sdpa_of(backend: Backend, capability: Capability) -> TorchFunctionMode:
    """Within this mode F.scaled_dot_product_attention is the kernel that SDPA would pick there."""
    if backend == "cpu":
        return _SdpaAs(_cpu_sdpa)
    return _SdpaAs(_ampere_sdpa if _has_flash(backend, capability) else _turing_sdpa)


def _has_flash(backend: Backend, capability: Capability) -> bool:
    return backend == "cpu" or capability is None or capability >= (8, 0)


class _SdpaAs(TorchFunctionMode):
    """Within this mode F.scaled_dot_product_attention is `kernel`."""

    def __init__(self, kernel: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is last_queries_attention:
            kwargs["last"] = True
        elif func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        if torch.is_autocast_enabled("cuda"):
            args = tuple(a.to(torch.bfloat16) if isinstance(a, torch.Tensor) else a for a in args)
        return self._kernel(*args, **kwargs)


# Each kernel below takes SDPA's arguments; with `last` the queries are the last of the keys' positions.
Mask = torch.Tensor | None


def _cpu_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Mask = None, **options: Any
) -> torch.Tensor:  # [B, H, T, D]
    if options.get("last"):  # no kernel of a CPU knows it
        ones = torch.ones(q.shape[2], k.shape[2], device=q.device, dtype=torch.bool)
        attn_mask = torch.tril(ones, diagonal=k.shape[2] - q.shape[2])
        del ones
    if options.get("dropout_p") or (attn_mask is not None and attn_mask.requires_grad):  # T5's zero bias
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)
    result: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q,
        k,
        v,
        0.0,
        options.get("is_causal", False),
        attn_mask=_additive(attn_mask, q),
        scale=options.get("scale"),
    )[0]
    return result


def _ampere_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Mask = None, **options: Any
) -> torch.Tensor:  # [B, H, T, D]
    """FlashAttention-2: no mask, 16 bits, at most 256 wide; it reads grouped heads as they are."""
    fits = attn_mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256
    if not fits:
        return _turing_sdpa(q, k, v, attn_mask, **options)
    # where lengths differ the kernel means by causal that the queries are the last
    causal = options.get("last") or options.get("is_causal", False)
    result: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, options.get("dropout_p", 0.0), causal, scale=options.get("scale")
    )[0]
    return result


def _turing_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Mask = None, **options: Any
) -> torch.Tensor:  # [B, H, T, D]
    """The memory-efficient kernel; it takes a mask but no grouped heads, which fall back to plain math."""
    if options.get("last"):
        return _efficient_last(q, k, v, **options)
    if options.get("enable_gqa"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)
    bias = _additive(attn_mask, q)
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    result: torch.Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        *(q, k, v, bias, True, options.get("dropout_p", 0.0), options.get("is_causal", False)),
        scale=options.get("scale"),
    )[0]
    return result


def _efficient_last(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> torch.Tensor:  # [B, H, t, D], [B, H, s, D]
    """The kernel behind the memory-efficient one, as torch's CausalBias calls it."""
    result: torch.Tensor = torch.ops.aten._efficient_attention_forward(
        *(t.transpose(1, 2) for t in (q, k, v)),
        *(None,) * 5,  # bias, and what packed sequences would need
        options.get("dropout_p", 0.0),
        int(CausalVariant.LOWER_RIGHT),
        compute_log_sumexp=True,
        scale=options.get("scale"),
    )[0].transpose(1, 2)
    return result


def _additive(mask: Mask, like: torch.Tensor) -> Mask:
    """A boolean mask becomes a float one of the query's dtype before any kernel sees it."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero, minus_inf = (torch.zeros((), dtype=like.dtype, device=like.device) for _ in range(2))
    return torch.where(mask, zero, minus_inf)


def hidden_bytes(name: str, args: tuple[Any, ...], backend: Backend) -> int:
    """Bytes that exist only while the operator `name` runs, beyond its inputs and outputs."""
    if name == "bitsandbytes.gemm_4bit.default":
        return _dequantized_bytes(args)
    if name == "aten._scaled_dot_product_flash_attention_backward.default" and backend == "cuda":
        return _flash_backward_bytes(query=args[1], key=args[2])
    if name == "aten._scaled_dot_product_flash_attention.default" and backend == "cuda":
        return _split_keys_bytes(query=args[0])
    if name == "aten._scaled_dot_product_flash_attention_for_cpu.default":
        return _cpu_flash_bytes(query=args[0], key=args[1])
    if name == "aten._linalg_svd.default":  # LAPACK and cuSOLVER work in a copy of the matrix
        return int(args[0].numel() * args[0].element_size())
    if name in _MASKING and backend == "cpu":
        return _cast_mask_bytes(name, args)
    return 0


_MASKING = {"aten.native_dropout.default", "aten.mul.Tensor", "aten.mul_.Tensor"}
HIDING = _MASKING | {  # the operators for which `hidden_bytes` may not be 0
    "bitsandbytes.gemm_4bit.default",
    "aten._linalg_svd.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_flash_attention_backward.default",
}


def _dequantized_bytes(args: tuple[Any, ...]) -> int:
    """bitsandbytes' gemm_4bit dequantises the whole weight above about 1,536 rows (fewer on newer cards).

    Counted always: N*K values of the activation's dtype and the float32 scales, before and after the offset.
    """
    activation, _, (rows, columns) = args[0], args[1], args[2]
    scales = 2 * 4 * math.ceil(rows * columns / NF4_BLOCK)
    return int(rows * columns * activation.element_size() + scales)


def _cast_mask_bytes(name: str, args: tuple[Any, ...]) -> int:
    """A CPU multiplies by a boolean mask (dropout does, too) through a copy of it in the other's dtype."""
    tensor, mask = args[0], args[1]
    masks = name == "aten.native_dropout.default" or (
        isinstance(mask, torch.Tensor) and mask.dtype == torch.bool
    )
    return int(tensor.numel() * tensor.element_size()) if masks else 0


def _split_keys_bytes(query: torch.Tensor) -> int:
    """FlashAttention-2 of one query a row shares the keys among idle multiprocessors, up to 128 ways.

    Each keeps a float32 output and a sum; from 0.8 blocks a multiprocessor on it does not split, and no card
    has more than 192 (torch, flash_api.cpp, num_splits_heuristic). query [B, Hq, T, D].
    """
    batch, heads, rows, width = query.shape
    if rows > 1:
        return 0
    return 4 * min(batch * heads, _MOST_SPLIT_BLOCKS) * _MOST_SPLITS * (math.ceil(width / 32) * 32 + 1)


def _cpu_flash_bytes(query: torch.Tensor, key: torch.Tensor) -> int:
    """A CPU's attention: each thread's tile of scores, sums and output in float32, 0.5 MB of long rows.

    In 16 bits a copy of the scores as well, and keys and values in the order that AMX wants them, which is
    counted on every CPU: which of them pack, torch does not say. query [B, Hq, T, D], key [B, Hkv, S, D]
    (torch, aten/native/cpu/FlashAttentionKernel.cpp, cpu_flash_attention).
    """
    batch, heads, rows, width = query.shape
    tile_rows = min(256 if rows >= 768 else 64 if rows >= 192 else 32, rows)
    tile_keys = min(512, key.shape[2])
    n_bytes = 4 * tile_rows * (tile_keys + 2 + width)
    if query.element_size() != 2:
        return int(torch.get_num_threads() * n_bytes)
    n_bytes += 2 * tile_rows * tile_keys
    packed = 2 * 2 * batch * heads * math.ceil(key.shape[2] / 64) * 64 * width
    return int(torch.get_num_threads() * n_bytes + packed)


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


def cublas_bytes(capability: Capability) -> tuple[int, ...]:
    """Workspaces that cuBLAS keeps for the life of the process, from the first matrix product on."""
    per_handle = CUBLAS_WORKSPACE_BYTES_SM90 if capability and capability[0] >= 9 else CUBLAS_WORKSPACE_BYTES
    return (per_handle,) * CUBLAS_WORKSPACES
