"""Loss and gradient by an online softmax over vocabulary tiles: the whole weight is nowhere at one time.

For hidden h [N, H], tiles W_j [v, H], z_j = shape(h W_j^T) with the model's scaling and soft cap:

    first sweep    m = max z, s = sum exp(z - m), and z at the target    loss = m + log s - z_target
    second sweep   dh = sum over j of ((exp(z_j - m) / s - onehot_j) * dz/d(h W_j^T)) W_j

The running maximum is the online softmax's (arXiv 1805.02867). Tiles are the outer loop, so that each is
read, dequantised or carried over twice for 8,192 tokens, however few have logits at one time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowvram.engine.head import TiledHead
from lowvram.engine.loss import Shaping, exact

# Tokens that one sweep over the weight serves. Qwen2-7B's head takes 0.09 s over PCIe 4 at 12 GB/s and its
# share of 8,192 tokens' arithmetic 0.12 s at 75 TFLOP/s, so it hides; their float32 gradient is 117 MB.
_SWEEP_TOKENS = 8192


@dataclass(frozen=True)
class TiledLoss:
    """A `loss.Head` over a tiled head: at most [chunk_tokens, tile] logits exist at one time."""

    head: TiledHead
    shaping: Shaping

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
        """[N, H], [N] -> []"""
        total = hidden.new_zeros((), dtype=exact(hidden))
        for part, wanted in _sweeps(hidden, targets):
            normalizer, at_target = self._statistics(part, wanted, chunk_tokens)
            total += (normalizer - at_target).sum()
        return total

    def loss_and_gradient(
        self, hidden: torch.Tensor, targets: torch.Tensor, chunk_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [N, H], [N] -> [], [N, H]
        total = hidden.new_zeros((), dtype=exact(hidden))
        gradient = torch.empty_like(hidden)
        done = 0
        for part, wanted in _sweeps(hidden, targets):
            normalizer, at_target = self._statistics(part, wanted, chunk_tokens)
            total += (normalizer - at_target).sum()
            gradient[done : done + len(part)] = self._gradient(part, wanted, normalizer, chunk_tokens)
            done += len(part)
        return total, gradient

    def _statistics(
        self, hidden: torch.Tensor, targets: torch.Tensor, chunk_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [N, H], [N] -> [N], [N]
        """log sum exp of each row's logits, and the logit of its target."""
        most = hidden.new_full((len(hidden),), -torch.inf, dtype=exact(hidden))
        summed, at_target = torch.zeros_like(most), torch.zeros_like(most)
        for start, tile in self.head.tiles():
            for at in range(0, len(hidden), chunk_tokens):
                rows = slice(at, at + chunk_tokens)
                logits = self._logits(hidden[rows], start, tile)
                column, inside = _columns(targets[rows], start, len(tile), logits.dtype)
                at_target[rows] += logits.gather(1, column).mul_(inside)[:, 0]
                higher = torch.maximum(most[rows], logits.amax(dim=1))
                new = logits.sub_(higher[:, None]).exp_().sum(dim=1)
                summed[rows] = summed[rows] * (most[rows] - higher).exp() + new
                most[rows] = higher
                del logits
        return most + summed.log(), at_target

    def _gradient(
        self, hidden: torch.Tensor, targets: torch.Tensor, normalizer: torch.Tensor, chunk_tokens: int
    ) -> torch.Tensor:  # [N, H], [N], [N] -> [N, H] in float32 or better, to sum 19 tiles of Qwen2-7B
        gradient = torch.zeros_like(hidden, dtype=exact(hidden))
        for start, tile in self.head.tiles():
            for at in range(0, len(hidden), chunk_tokens):
                rows = slice(at, at + chunk_tokens)
                logits = self._logits(hidden[rows], start, tile)
                slope = self.shaping.slope(logits)
                column, inside = _columns(targets[rows], start, len(tile), logits.dtype)
                error = logits.sub_(normalizer[rows, None]).exp_().scatter_add_(1, column, -inside)
                gradient[rows] += error.mul_(slope).to(tile.dtype) @ tile
                del logits, error, slope
        return gradient

    def _logits(self, hidden: torch.Tensor, start: int, tile: torch.Tensor) -> torch.Tensor:
        """[C, H] -> [C, v] as the loss takes them."""
        return self.shaping.shaped(self.head.logits(hidden, start, tile).to(exact(hidden)))


def _sweeps(hidden: torch.Tensor, targets: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    starts = range(0, len(hidden), _SWEEP_TOKENS)
    return [(hidden[s : s + _SWEEP_TOKENS], targets[s : s + _SWEEP_TOKENS]) for s in starts]


def _columns(
    targets: torch.Tensor, start: int, n_rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:  # [C] -> [C, 1], [C, 1]
    """Where in the tile each target is, and 1.0 where it is inside (elsewhere any column will do)."""
    column = (targets - start)[:, None]
    inside = (column >= 0) & (column < n_rows)
    return column.clamp(0, n_rows - 1), inside.to(dtype)
