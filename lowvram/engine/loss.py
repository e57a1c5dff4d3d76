"""Cross-entropy on the trained tokens only, a chunk of logits at a time.

The full logits of 8,192 tokens over Qwen2's 152k words take 2.5 GB in bf16 and 5 GB in float32, several
times over in a plain loss. Here the head sees only trained tokens, one chunk's logits exist at a time, and
the gradient of each chunk is taken at once (method: Liger Kernel's fused linear cross-entropy,
arXiv 2410.10989; Cut Cross-Entropy, arXiv 2411.09009).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

LogitsOf = Callable[[torch.Tensor], torch.Tensor]  # [C, H] -> [C, V]


class Head(Protocol):
    """Makes a loss of hidden states; its own parameters are frozen."""

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
        """Sum over the rows, without a gradient: [N, H], [N] -> []."""

    def loss_and_gradient(
        self, hidden: torch.Tensor, targets: torch.Tensor, chunk_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with its gradient by `hidden`: [N, H], [N] -> [], [N, H]."""


@dataclass(frozen=True)
class Shaping:
    """What the model's own forward does to its head's output: z = cap * tanh(scale * x / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def shaped(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    def slope(self, shaped: torch.Tensor) -> torch.Tensor | float:
        """dz/dx of shaped logits z: scale * (1 - (z / cap)^2)."""
        return self.scale * (1 - (shaped / self.cap) ** 2) if self.cap else self.scale


def shaping_of(config: PretrainedConfig) -> Shaping:
    """Of a decoder-only model."""
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return Shaping(scale, cap or None)


def logits_function(head: nn.Module, config: PretrainedConfig) -> LogitsOf:
    """The head with the scaling or soft cap that the model's own forward applies to its logits."""
    if config.is_encoder_decoder:
        return _t5_logits(head, config)
    shaping = shaping_of(config)

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        return shaping.shaped(head(hidden))

    return logits_of


def _t5_logits(head: nn.Module, config: PretrainedConfig) -> LogitsOf:
    """T5 shrinks the hidden states before a head that it shares with its embedding (arXiv 1910.10683)."""
    shrinks = getattr(config, "scale_decoder_outputs", False)  # mT5 does not

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = head(hidden * config.d_model**-0.5 if shrinks else hidden)
        return logits

    return logits_of


@dataclass(frozen=True)
class WholeHead:
    """A head that is on the device as a whole: a chunk of rows has all its logits."""

    logits_of: LogitsOf

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=exact(hidden))
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = self.logits_of(hidden[start : start + chunk_tokens])
            total += _summed_loss(part, targets[start : start + chunk_tokens])
        return total

    def loss_and_gradient(
        self, hidden: torch.Tensor, targets: torch.Tensor, chunk_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=exact(hidden))
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = hidden[start : start + chunk_tokens].detach().requires_grad_()
            with torch.enable_grad():
                loss = _summed_loss(self.logits_of(part), targets[start : start + chunk_tokens])
            grad[start : start + chunk_tokens] = torch.autograd.grad(loss, part)[0]
            total += loss.detach()
            del part, loss
        return total, grad


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed loss whose backward only multiplies: the gradient was computed chunk by chunk in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head, chunk_tokens: int
    ) -> torch.Tensor:  # hidden [N, H], targets [N] -> []
        total, grad = head.loss_and_gradient(hidden, targets, chunk_tokens)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].to(grad.dtype), None, None, None


def exact(tensor: torch.Tensor) -> torch.dtype:
    """In which sums over it are made: float32, or its own where that is better."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.to(exact(logits)), targets, reduction="sum")


def summed_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, chunk_tokens: int
) -> torch.Tensor:
    """Sum over N tokens of -log p(target), in float32 or better.

    Args:
        hidden: [N, H] last hidden states of the positions that are trained.
        targets: [N] the next token of each.
        head: frozen; its own parameters receive no gradient.
        chunk_tokens: how many rows of logits exist at one time.
    """
    if torch.is_grad_enabled():
        loss: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, targets, head, chunk_tokens
        )
        return loss
    return head.loss(hidden, targets, chunk_tokens)
