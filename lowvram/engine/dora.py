"""DoRA (arXiv 2402.09353) without a dequantised weight or a product of the weight's size.

    y = g * (W d + s B A d) + bias       g = m / n, one number a row       n_i = || w_i + s b_i A ||

with d the (dropped) input; the norm is a constant to the gradient (section 4.3 of the paper). It follows from
what needs no [out, in]: ||w_i||^2, known once, W A^T, of r columns by the layer's own kernel, and A A^T:

    n_i^2 = ||w_i||^2 + 2 s b_i . (W A^T)_i + s^2 b_i (A A^T) b_i^T

peft makes W + s B A, dequantised, on every forward pass: of Qwen2-7B's gate_proj 136 MB in bf16 and as much
again for B A. Its semantics are kept: where there is dropout, the base's product in y is W x + (g - 1) W d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.autograd.function import once_differentiable

from lowvram.engine.biases import plus_bias, product_of, summed
from lowvram.engine.linears import in_out_features
from lowvram.engine.lora import drop, drop_again, how_dropped, through_dropout

_UNITS_AT_ONCE = 256  # columns of a weight that are read at one time for its rows' norms


class Dora(DoraLinearVariant):  # type: ignore[misc]  # peft ships no types
    """peft's DoRA whose magnitude is made without the weight; `start_magnitudes` fills it."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:  # noqa: ARG004  # peft's interface
        if "lora_magnitude_vector" not in module.adapter_layer_names:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        b = module.lora_B[adapter_name].weight  # [out, r]
        made = {"dtype": torch.promote_types(b.dtype, torch.float32), "device": b.device}
        magnitude = DoraLinearLayer(fan_in_fan_out=module.fan_in_fan_out)  # its names are peft's in the file
        magnitude.weight = nn.Parameter(torch.ones(b.shape[0], **made))
        magnitude.register_buffer("row_squares", torch.ones(b.shape[0], **made), persistent=False)
        module.lora_magnitude_vector[adapter_name] = magnitude


def is_dora(layer: LoraLayer) -> bool:
    """Whether `dora_linear`'s formula holds: one adapter, not merged, and of our kind."""
    kinds = [layer.lora_variant.get(name) for name in layer.active_adapters]
    return len(kinds) == 1 and type(kinds[0]) is Dora and not (layer.merged or layer.disable_adapters)


@torch.no_grad()
def start_magnitudes(model: nn.Module, at: Callable[[str], None] = lambda _: None) -> None:
    """m = || W + s B A || of each row, so that the first step's output is the one without DoRA.

    Args:
        at: hears each layer's name before its turn, "" at the end.
    """
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name in (name for name, kind in layer.lora_variant.items() if type(kind) is Dora):
            at(path)
            magnitude = layer.lora_magnitude_vector[name]
            magnitude.row_squares.copy_(row_squares(layer.base_layer, magnitude.weight.dtype))
            magnitude.weight.copy_(row_norms(layer, name))
    at("")


def row_squares(linear: Any, dtype: torch.dtype) -> torch.Tensor:  # -> [out]
    """||w_i||^2 of the weight as the layer's products see it: by its product with unit vectors.

    As many as the layer is wide, 256 at one time; for Qwen2-7B all in all the arithmetic of a forward pass
    of about 5,000 tokens, once.
    """
    base = linear.weight
    n_in = in_out_features(linear)[0]
    squares: torch.Tensor | None = None
    for start in range(0, n_in, _UNITS_AT_ONCE):
        n_rows = min(_UNITS_AT_ONCE, n_in - start)
        units = torch.zeros((n_rows, n_in), dtype=_computes_in(linear), device=base.device)
        units.diagonal(start).fill_(1)
        some = product_of(linear, units).to(dtype).square_().sum(0)  # [256, out] -> [out]
        squares = some if squares is None else squares.add_(some)
    assert squares is not None
    return squares


def _computes_in(linear: Any) -> torch.dtype:
    """A quantised layer says so; another's weight does."""
    dtype: torch.dtype = getattr(linear, "compute_dtype", None) or linear.weight.dtype
    return dtype


@torch.no_grad()
def row_norms(layer: Any, name: str) -> torch.Tensor:  # -> [out]
    """|| w_i + s b_i A ||, in float32 or better but for W A^T, which has the activations' dtype."""
    a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    magnitude = layer.lora_magnitude_vector[name]
    wide = product_of(layer.base_layer, a.to(_computes_in(layer.base_layer)))  # A W^T, [r, out]
    cross = (b * wide.t().to(b.dtype)).sum(1)
    own = ((b @ (a @ a.t())) * b).sum(1)
    squares: torch.Tensor = magnitude.row_squares + 2 * scaling * cross + scaling**2 * own
    return squares.clamp_(min=torch.finfo(squares.dtype).tiny).sqrt_()


def dora_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:  # [.., in] -> [.., out]
    """The whole layer: base product, adapter and magnitude, then the bias, which has no magnitude."""
    (name,) = layer.active_adapters
    a, b, m = (part[name].weight for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    product = product_of(layer.base_layer, x)
    p, redraws = how_dropped(layer.lora_dropout[name], x.device)
    rest = layer.base_layer, layer.scaling[name], p, redraws
    result = _DoraAdd.apply(product, x, a, b, m, row_norms(layer, name), *rest)  # type: ignore[no-untyped-call]
    return plus_bias(result, layer.base_layer.bias)


class _DoraAdd(torch.autograd.Function):
    """product += (g - 1) W d + g s B A d, in place; W d is made again in backward, not kept.

    Kept it would be [T, out] a layer, as much as all that LoRA keeps for it; so it costs one product more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        product: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        m: torch.Tensor,
        norms: torch.Tensor,
        linear: Any,
        scaling: float,
        p: float,
        redraws: bool,
    ) -> torch.Tensor:  # [.., out], [.., in], [r, in], [out, r], [out], [out] -> [.., out]
        ctx.mark_dirty(product)
        ctx.linear, ctx.p, ctx.scaling = linear, p, scaling
        ctx.share = 1.0 if redraws or not p else 1 / (1 - p)  # there the kernel has divided
        dtype, gain = product.dtype, m / norms
        dropped, memory = drop(x.reshape(-1, x.shape[-1]).to(dtype), p, redraws)  # [T, in]
        ctx.save_for_backward(x, a, b, m, norms, memory)
        rows = product.view(-1, b.shape[0])  # [T, out]
        hidden = dropped @ a.to(dtype).t()  # [T, r]
        rows.addcmul_(product_of(linear, dropped) if p else rows, ((gain - 1) * ctx.share).to(dtype))
        del dropped
        rows.addmm_(hidden, (gain[:, None] * b).to(dtype).t(), alpha=scaling * ctx.share)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        x, a, b, m, norms, memory = ctx.saved_tensors
        grad = grad_outputs[0].reshape(-1, b.shape[0])  # [T, out]
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        dtype, gain, scale = grad.dtype, m / norms, ctx.scaling * ctx.share
        extra = ((gain - 1) * ctx.share).to(dtype)  # [out]
        dropped, which = drop_again(x.reshape(-1, a.shape[1]).to(dtype), ctx.p, memory)  # [T, in]
        hidden = dropped @ a.to(dtype).t()  # [T, r]
        grad_dropped, grad_m = _through_base(ctx, grad, dropped, extra, hidden, b)
        narrow = grad @ (gain[:, None] * b).to(dtype) * scale  # [T, r]
        grad_a = (narrow.t() @ dropped).to(a.dtype) if needs_a else None
        del dropped
        grad_b = (gain[:, None] * (grad.t() @ (hidden * scale))).to(b.dtype) if needs_b else None
        grad_x = None
        if needs_x:
            through = narrow @ a.to(dtype)
            if grad_dropped is not None:
                through += grad_dropped
            grad_x = through_dropout(through, which, ctx.p).view_as(x).to(x.dtype)
        del grad_dropped
        back = grad_outputs[0] if ctx.p else torch.addcmul(grad_outputs[0], grad_outputs[0], extra)
        return back, grad_x, grad_a, grad_b, (grad_m * ctx.share / norms).to(m.dtype), *(None,) * 5


def _through_base(
    ctx: Any,
    grad: torch.Tensor,
    dropped: torch.Tensor,
    extra: torch.Tensor,
    hidden: torch.Tensor,
    b: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor]:  # [T, out], [T, in], [out], [T, r], [out, r] -> [T, in], [out]
    """What reaches the dropped input through (g - 1) W d, and sum over T of grad * (W d + s B A d)."""
    with torch.set_grad_enabled(bool(ctx.p) and ctx.needs_input_grad[1]):
        leaf = dropped.detach().requires_grad_(torch.is_grad_enabled())
        again = product_of(ctx.linear, leaf)  # [T, out]
    grad_dropped = torch.autograd.grad(again, leaf, grad * extra)[0] if again.requires_grad else None
    again = again.detach()
    again.addmm_(hidden, b.to(grad.dtype).t(), alpha=ctx.scaling)
    return grad_dropped, summed(again.mul_(grad), b.dtype)
