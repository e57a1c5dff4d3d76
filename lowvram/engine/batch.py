"""Batch: tokenised examples as the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lowvram.data.tokens import Example


@dataclass(frozen=True)
class Batch:
    """One micro-batch, right-padded; padding is told by position, never by token id."""

    input_ids: torch.Tensor  # [B, T] int64
    positions: torch.Tensor  # [N] int64 into the flattened B*T: predicts a trained token
    targets: torch.Tensor  # [N] int64: the token that follows each position
    source_ids: torch.Tensor | None = None  # [B, S] int64: what a T5-type model's encoder reads
    source_mask: torch.Tensor | None = None  # [B, S] int64: 0 on the encoder's padding

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.input_ids, self.positions, self.targets, self.source_ids, self.source_mask

    @property
    def trained_tokens(self) -> int:
        return int(self.targets.shape[0])

    def to(self, device: torch.device | str) -> Batch:
        moved = [None if t is None else t.to(device, non_blocking=True) for t in self.tensors]
        return Batch(*moved)  # type: ignore[arg-type]  # the first three are tensors


def tile_bounds(length: int, tile_tokens: int) -> list[tuple[int, int]]:
    """(start, end) of each tile of a sequence; `tile_tokens` 0 takes it whole."""
    step = min(tile_tokens or length, length)
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def trained_by_tile(
    positions: torch.Tensor, targets: torch.Tensor, batch_size: int, bounds: list[tuple[int, int]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:  # [N], [N] -> [n], [n] for each tile
    """The trained positions of each tile, counted in the flattened tile, and their targets.

    How many there are decides shapes, so this looks at values, on the host. Those of a trace have none: there
    every token but the last of a row is trained.
    """
    length = bounds[-1][1]
    if positions.is_meta:
        counts = [batch_size * (end - start - (end == length)) for start, end in bounds]
        return [(torch.empty_like(positions[:n]), torch.empty_like(targets[:n])) for n in counts]
    on_host = positions.cpu()  # one copy: a GPU is waited for
    row, at = on_host // length, on_host % length
    tiles = []
    for start, end in bounds:
        here = ((at >= start) & (at < end)).nonzero().flatten()
        chosen = row[here] * (end - start) + at[here] - start
        tiles.append((chosen.to(positions.device), targets[here.to(targets.device)]))
    return tiles


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Right-pad to the longest example; list the positions that predict a trained token.

    Worked example, two rows, trained tokens in brackets, `_` is padding:

        a [b c]      positions 0 1 (row 0: a predicts b, b predicts c)
        d  [e] _     position  3   (row 1 starts at 1 * T = 3: d predicts e)
    """
    length = max(len(e.input_ids) for e in examples)
    rows, positions, targets = [], [], []
    for index, example in enumerate(examples):
        ids = list(example.input_ids)
        rows.append(ids + [pad_token_id] * (length - len(ids)))
        for at in range(1, len(ids)):
            if example.trained[at]:
                positions.append(index * length + at - 1)
                targets.append(ids[at])
    return Batch(
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
    )
