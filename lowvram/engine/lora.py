"""LoRA's product as one autograd function that keeps what it is given, on a CPU what was dropped as well."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable

from lowvram.engine.adapter_start import capture_of, difference_factors, start_of


def lora_linear(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:  # [.., in] -> [.., out]
    """y = base(x) + scaling * B(A(dropout(x))) with A and B cast to the base's dtype.

    peft casts the activations up to the adapter's float32 instead: a copy of 4 bytes an element of every
    layer's input, kept for backward with its dropped copy and the mask. Casting the weights costs
    r*(in+out)*2 bytes, about 1 MB a layer, for as long as a product takes.
    """
    if (looks := capture_of(layer)) is not None:  # an initialisation looks at the base
        return looks(x)
    result: torch.Tensor = layer.base_layer(x)
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight  # [r, in], [out, r]
        if result._is_view():  # F.linear with a bias, Conv1D: autograd would copy the gradient twice
            result = result.clone()
        p, redraws = how_dropped(layer.lora_dropout[name], x.device)
        result = _LoraAdd.apply(  # type: ignore[no-untyped-call]
            result, x, a, b, layer.scaling[name], p, redraws, *start_of(layer)
        )
    return result


def how_dropped(dropout: nn.Module, device: torch.device) -> tuple[float, bool]:
    """Which share is dropped now (peft puts an Identity for 0), and whether backward draws again."""
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return p, _redraws(device, dropout)


def _redraws(device: torch.device, dropout: nn.Module) -> bool:
    """Whether backward draws the mask again instead of keeping what was dropped.

    On a GPU drawing costs nothing, for one kernel draws and drops, and backward needs the dropped input
    anyway; kept masks would be 83 MB in a layer of Qwen2-7B with 2,048 tokens. A CPU's generator is slow: a
    mask of all elements takes 10 % of a step of SmolLM2-135M. On the meta device a trace's dropout says.
    """
    if device.type == "meta":
        return bool(getattr(dropout, "redraws", True))
    return device.type != "cpu"


class _LoraAdd(torch.autograd.Function):
    """result += scaling * (dropout(x) A^T) B^T, in place: one [T, out] less than a sum.

    No base layer keeps its own output for backward, so changing it harms nobody. Where A is frozen (LoRA-FA,
    arXiv 2308.03303) its input is not kept either, only x A^T: r numbers a token instead of thousands. With a
    start (A0, B0) it is B A - B0 A0 that is multiplied with, as a product of rank 2r (`difference_factors`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        p: float,
        redraws: bool,
        a0: torch.Tensor | None = None,
        b0: torch.Tensor | None = None,
    ) -> torch.Tensor:  # [.., out], [.., in], 2 times [r, in] and [out, r] -> [.., out]
        ctx.mark_dirty(result)
        ctx.p, ctx.scaling = p, scaling if redraws else scaling / (1 - p)  # there the kernel has divided
        ctx.shape, ctx.dtype = x.shape, x.dtype
        dtype = result.dtype  # x's, but for fp16's autocast, which hands on float32 from LayerNorm
        rows = x.reshape(-1, x.shape[-1]).to(dtype)  # [T, in]
        dropped, memory = drop(rows, p, redraws)
        down, up = difference_factors(a, b, a0, b0, dtype)  # [r or 2r, in], [out, r or 2r]
        hidden = (dropped @ down.t()).to(dtype)  # [T, r or 2r], of which the first r are x A^T
        kept = x if ctx.needs_input_grad[2] else hidden[:, : a.shape[0]]
        ctx.save_for_backward(kept, a, b, memory, a0, b0)
        del dropped
        result.view(-1, b.shape[0]).addmm_(hidden, up.t(), alpha=ctx.scaling)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        """x A^T (r columns) and the dropped x (one kernel) are made again, not kept."""
        kept, a, b, memory, a0, b0 = ctx.saved_tensors
        grad = grad_outputs[0].reshape(-1, b.shape[0])  # [T, out]
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        down, up = difference_factors(a, b, a0, b0, grad.dtype)
        narrow = grad @ up * ctx.scaling  # [T, r or 2r]
        r = a.shape[0]  # A is the first r rows of `down`; B is the sum of both halves of `up`
        grad_a = None
        if needs_a:
            dropped, which = drop_again(kept.reshape(-1, a.shape[1]).to(grad.dtype), ctx.p, memory)  # [T, in]
            of_b = narrow if a0 is None else narrow[:, :r] + narrow[:, r:]  # [T, r]
            grad_a = (of_b.t() @ dropped).to(a.dtype)
            hidden = dropped @ down[:r].t() if needs_b else None  # [T, r]
            del dropped, of_b
            grad_x = _input_gradient(narrow, down, which, ctx.p) if needs_x else None
        else:
            hidden = kept
            grad_x = _gradient_dropped_again(narrow @ down, ctx.p, memory) if needs_x else None
        grad_b = (grad.t() @ (hidden * ctx.scaling)).to(b.dtype) if needs_b else None
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
        return grad_outputs[0], grad_x, grad_a, grad_b, *(None,) * 5


def drop(
    rows: torch.Tensor, p: float, redraws: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:  # [T, in] -> [T, in], int64 places or the generator's state
    """Dropped rows, divided by 1 - p if a kernel draws, and what makes them again."""
    if not p:
        return rows, None
    if redraws:
        state = None if rows.is_meta else _generator(rows.device).get_state()
        return torch.native_dropout(rows, p, True)[0], state
    places = dropped_places(rows.numel(), p, rows.device)
    return _without(_copied(rows), places), places


def drop_again(
    rows: torch.Tensor, p: float, memory: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:  # [T, in] -> [T, in], int64 places or bool [T, in]
    """The forward's dropped rows, and which they are: the places, or a mask that is True where kept."""
    if not p:
        return rows, None
    if memory is not None and memory.dtype == torch.int64:
        return _without(_copied(rows), memory), memory
    with _from_state(rows.device, memory):
        dropped, mask = torch.native_dropout(rows, p, True)
    return dropped, mask


def dropped_places(n_elements: int, p: float, device: torch.device) -> torch.Tensor:  # -> int64 [~ n p]
    """Which of `n_elements` are dropped, each with probability p.

    From one to the next it is a geometric number of elements, so that only those dropped are drawn: at
    p = 0.05 a fifth of the time and half of the memory of a mask.
    """
    sigma = math.sqrt(n_elements * p * (1 - p))
    most = math.ceil(n_elements * p + 8 * sigma) + 8  # that they do not reach the end happens once in 1e15
    gaps = torch.empty(most, dtype=torch.int64, device=device).geometric_(p)
    places = gaps.cumsum_(0).sub_(1)
    inside = places < n_elements
    count = round(n_elements * p) if inside.is_meta else int(inside.sum())
    return places[:count].clone()


def _copied(rows: torch.Tensor) -> torch.Tensor:
    return rows.clone(memory_format=torch.contiguous_format)


def _without(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`rows`, zero at these places of all its elements."""
    rows.view(-1).index_fill_(0, places, 0)
    return rows


def _input_gradient(
    narrow: torch.Tensor, a: torch.Tensor, which: torch.Tensor | None, p: float
) -> torch.Tensor:  # [T, r], [r, in] -> [T, in]
    if which is None or which.dtype == torch.int64:
        return through_dropout(narrow @ a, which, p)
    return (narrow / (1 - p) @ a).mul_(which)


def through_dropout(
    gradient: torch.Tensor, which: torch.Tensor | None, p: float
) -> torch.Tensor:  # [T, in] -> [T, in], in place
    """Of the dropped rows as `drop` gave them -> of the rows; `which` as `drop_again` says."""
    if which is None:
        return gradient
    if which.dtype == torch.int64:
        return _without(gradient, which)
    return gradient.div_(1 - p).mul_(which)


def _gradient_dropped_again(
    gradient: torch.Tensor, p: float, memory: torch.Tensor | None
) -> torch.Tensor:  # [T, in] -> [T, in]
    """As `through_dropout`, where the rows were not kept: the mask depends on their number only."""
    places = memory is not None and memory.dtype == torch.int64
    return through_dropout(gradient, memory, p) if places else drop_again(gradient, p, memory)[0]


@contextmanager
def _from_state(device: torch.device, state: torch.Tensor | None) -> Iterator[None]:
    """Draw from `state` on (the meta device has none); afterwards go on as if nothing had been drawn."""
    if state is None:
        yield
        return
    generator = _generator(device)
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)


def _generator(device: torch.device) -> torch.Generator:
    return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
