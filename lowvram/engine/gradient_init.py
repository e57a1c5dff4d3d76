"""The gradient of whole frozen weights, layer by layer, in ordinary steps; and the adapters made from it.

A layer's weight gradient is dY^T X, of which an ordinary step has both: X is the layer's input and dY what
backward brings to its output. That is the gradient of the weight as it is multiplied with, dequantised from
4 or 8 bits or not. So no weight needs to be a float that requires a gradient, and no two gradients need be on
the device at one time: each is added to a sum in host memory as soon as it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lowvram.engine.adapter_start import factors_of, set_capture
from lowvram.engine.batch import Batch
from lowvram.engine.host import Host
from lowvram.engine.loss import exact
from lowvram.engine.singular import Singular

GA_GAMMA = 16  # LoRA-GA's: the authors' stable_gamma
ONE_GAMMA = 128  # LoRA-One's: the authors' conf/init/gradient.yaml
_AT_ONCE = 512  # tokens whose X and dY are in float32 at one time: 46 MB of a layer of Qwen2-7B

Sink = Callable[[torch.Tensor, torch.Tensor], None]  # hears dY [T, out] and X [T, in]
Backward = Callable[[torch.Tensor], None]


def lora_ga(found: Singular, rank: int) -> tuple[torch.Tensor, torch.Tensor]:  # -> [r, in], [out, r]
    """A = V[:, :r]^T and B = U[:, r:2r] of the gradient, both times out^(1/4) / sqrt(16).

    LoRA-GA's directions and its scale for a stable output (arXiv 2407.05000, theorems 3.1 and 3.2; ArB2r and
    stable in the authors' reproduce/run_exp.py), for eta = alpha/sqrt(r). No singular values: peft 0.21
    multiplies B with them, and leaves A unscaled.
    """
    size = found.u.shape[0] ** 0.25 / GA_GAMMA**0.5
    return found.v[:, :rank].t() * size, found.u[:, rank : 2 * rank] * size


def lora_one(found: Singular, rank: int) -> tuple[torch.Tensor, torch.Tensor]:  # -> [r, in], [out, r]
    """B A = the best rank-r approximation of -G, over its largest singular value and over gamma = 128.

    A = sqrt(S_r / S_1) V_r^T / sqrt(gamma) and B = U_r sqrt(S_r / S_1) / sqrt(gamma): LoRA-One, algorithm 1
    of arXiv 2502.01235 as its authors run it (github.com/YuanheZ/LoRA-One, run_exp.py). B A stays in the
    model: it is one step of gradient descent, and not subtracted.
    """
    root = (found.s[:rank] / found.s[0] / ONE_GAMMA).sqrt()  # [r]
    return root[:, None] * found.v[:, :rank].t(), -found.u[:, :rank] * root


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:  # [T, out], [T, in] -> [out, in]
    """dY^T X in float32 or better, some tokens at a time."""
    dtype = exact(x)
    total = torch.zeros((grad.shape[1], x.shape[1]), dtype=dtype, device=x.device)
    for start in range(0, x.shape[0], _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        total.addmm_(grad[some].to(dtype).t(), x[some].to(dtype))
    return total


def summed_gradients(
    loss_of: nn.Module,
    layers: Mapping[str, Any],
    wanted: Iterable[str],
    batches: Sequence[Batch],
    host: Host,
    backward: Backward,
) -> dict[str, torch.Tensor]:
    """Gradients of the summed loss of all batches by the weights of the `wanted` layers, in host memory.

    The adapters are left out of the model while it runs: it is the base's gradient.

    Args:
        layers: all adapted ones.
        backward: of a micro-batch's loss.
    """
    sums: dict[str, torch.Tensor] = {}

    def sink(name: str, grad: torch.Tensor, x: torch.Tensor) -> None:
        sums[name] = host.added(sums.get(name), weight_gradient(grad, x))

    with _captured(layers, {name: partial(sink, name) for name in wanted}):
        for batch in batches:
            loss = loss_of(*batch.to(host.device).tensors, lengths=batch.lengths)
            backward(loss)
            del loss
    return sums


@contextmanager
def _captured(layers: Mapping[str, Any], sinks: Mapping[str, Sink]) -> Iterator[None]:
    """Every adapted layer is its base alone; those with a sink tell it their gradients."""
    for name, layer in layers.items():
        sink = sinks.get(name)
        set_capture(layer, layer.base_layer if sink is None else partial(_base_output, layer, sink))
    try:
        yield
    finally:
        for layer in layers.values():
            set_capture(layer, None)


def _base_output(layer: Any, sink: Sink, x: torch.Tensor) -> torch.Tensor:  # [.., in] -> [.., out]
    result: torch.Tensor = layer.base_layer(x)
    if not torch.is_grad_enabled():
        return result
    told: torch.Tensor = _Told.apply(result, x, factors_of(layer)[1], sink)  # type: ignore[no-untyped-call]
    return told


class _Told(torch.autograd.Function):
    """Nothing is done to the output; in backward the sink hears its gradient and the input."""

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, x: torch.Tensor, _anchor: torch.Tensor, sink: Sink
    ) -> torch.Tensor:  # [.., out], [.., in], a parameter, so that there is a backward -> [.., out]
        ctx.sink = sink
        ctx.save_for_backward(x)
        return result.view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        grad = grad_outputs[0]
        ctx.sink(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]))
        return grad, None, None, None


def groups_within(sizes_bytes: Mapping[str, int], room_bytes: int | None) -> list[list[str]]:
    """Neighbours whose sums fit the host together; one that does not fit alone is a group all the same."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, n_bytes in sizes_bytes.items():
        if room_bytes is not None and groups[-1] and used + n_bytes > room_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += n_bytes
    return groups
