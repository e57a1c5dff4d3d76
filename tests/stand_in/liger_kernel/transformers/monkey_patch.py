"""Stand-in for Liger's patching of a Llama: the instance by bound methods, transformers' module as well."""

from __future__ import annotations

from types import MethodType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from triton.runtime import JITFunction

Array = npt.NDArray[np.float32]


@JITFunction
def _norm(y: Array, x: Array, weight: Array, rstd: Array, eps: float) -> None:
    rstd[:] = 1 / np.sqrt((x * x).mean(-1) + eps)
    y[:] = x * rstd[:, None] * weight


@JITFunction
def _norm_backward(dy: Array, x: Array, weight: Array, rstd: Array) -> None:
    scaled, normed = dy * weight, x * rstd[:, None]
    dy[:] = rstd[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdims=True))


@JITFunction
def _gate(c: Array, a: Array, b: Array) -> None:
    c[:] = a / (1 + np.exp(-a)) * b


@JITFunction
def _gate_backward(dc: Array, a: Array, b: Array) -> None:
    sigmoid = 1 / (1 + np.exp(-a))
    silu = a * sigmoid
    da = dc * b * (silu * (1 - sigmoid) + sigmoid)
    b[:] = dc * silu
    a[:] = da


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, rstd = torch.empty_like(rows), torch.empty(rows.shape[0], device=x.device)
        _norm[(rows.shape[0],)](y, rows, weight, rstd, eps)
        ctx.save_for_backward(rows, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        rows, weight, rstd = ctx.saved_tensors
        _norm_backward[(1,)](dy.view(rows.shape), rows, weight, rstd)
        return dy, None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        c = torch.empty_like(a)
        _gate[(1,)](c, a, b)
        ctx.save_for_backward(a, b)
        return c

    @staticmethod
    def backward(ctx: Any, dc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = ctx.saved_tensors
        _gate_backward[(1,)](dc, a, b)
        return a, b


class LigerRMSNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Norm.apply(x, self.weight, self.variance_epsilon)


class LigerSwiGLUMLP(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(_SiluMul.apply(self.gate_proj(x), self.up_proj(x)))


def _apply_liger_kernel_to_instance(model: Any, **parts: bool) -> None:
    from transformers.models.llama import modeling_llama

    wanted = {name for name, on in parts.items() if on}
    assert wanted == {"rms_norm", "swiglu", "geglu"}, "the others would reach other models, or the loss"
    modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP = LigerRMSNorm, LigerSwiGLUMLP
    for module in model.modules():
        ours = {"LlamaRMSNorm": LigerRMSNorm, "LlamaMLP": LigerSwiGLUMLP}.get(type(module).__name__)
        if ours is not None:
            module.forward = MethodType(ours.forward, module)
