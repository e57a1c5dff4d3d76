"""Batch: tokenised examples as the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lowvram.data.tokens import Example


@dataclass(frozen=True)
class Batch:
    """One micro-batch, right-padded or packed; padding is told by position, never by token id."""

    input_ids: torch.Tensor  # [B, T] int64
    positions: torch.Tensor  # [N] int64 into the flattened B*T: predicts a trained token
    targets: torch.Tensor  # [N] int64: the token that follows each position
    source_ids: torch.Tensor | None = None  # [B, S] int64: what a T5-type model's encoder reads
    source_mask: torch.Tensor | None = None  # [B, S] int64: 0 on the encoder's padding
    # Of a packed row's examples, summing to T. Numbers and no tensor: they decide shapes, so one on a GPU
    # would have to be waited for, and one of a trace has no values.
    lengths: tuple[int, ...] | None = field(default=None, kw_only=True)

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.input_ids, self.positions, self.targets, self.source_ids, self.source_mask

    @property
    def trained_tokens(self) -> int:
        return int(self.targets.shape[0])

    @property
    def limited_tokens(self) -> int:
        """Padding included, what the plan's sequence length limits: an encoder's tokens, else all."""
        return (self.input_ids if self.source_ids is None else self.source_ids).numel()

    def to(self, device: torch.device | str) -> Batch:
        moved = [None if t is None else t.to(device, non_blocking=True) for t in self.tensors]
        return Batch(*moved, lengths=self.lengths)  # type: ignore[arg-type]  # the first three are tensors


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
    return Batch(
        _padded([list(e.input_ids) for e in examples], pad_token_id),
        *_trained(examples, range(0, len(examples) * length, length)),
    )


def collate_packed(examples: Sequence[Example]) -> Batch:
    """One row of all examples, end to end; an example's first token is not predicted from its neighbour.

    Worked example, the two above:

        a [b c] d [e]      lengths 3 2, positions 0 1 3
    """
    lengths = tuple(len(e.input_ids) for e in examples)
    ids = [token for e in examples for token in e.input_ids]
    starts = accumulate(lengths[:-1], initial=0)
    return Batch(torch.tensor([ids], dtype=torch.int64), *_trained(examples, starts), lengths=lengths)


def start_token(config: PretrainedConfig) -> int:
    """What an encoder-decoder's decoder reads before its target: T5 takes its padding for that."""
    return int(getattr(config, "decoder_start_token_id", None) or config.pad_token_id or 0)


def collate_pairs(examples: Sequence[Example], pad_token_id: int, start_token_id: int) -> Batch:
    """Sources and targets of an encoder-decoder, each right-padded to its longest.

    The decoder reads a start token and then the target, one token behind what it has to predict (T5's shift,
    arXiv 1910.10683). Worked example, `^` starts, `_` is padding:

        source  a b c    target  d e       decoder  ^ d    positions 0 1    targets d e
        source  f        target  g                  ^ _    position  2      target  g
    """
    targets = [list(e.input_ids) for e in examples]
    decoder = _padded([[start_token_id, *target[:-1]] for target in targets], pad_token_id)  # [B, T]
    width = decoder.shape[1]
    positions = [row * width + at for row, target in enumerate(targets) for at in range(len(target))]
    sources = [list(e.source_ids or ()) for e in examples]
    return Batch(
        decoder,
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor([token for target in targets for token in target], dtype=torch.int64),
        _padded(sources, pad_token_id),
        _padded([[1] * len(source) for source in sources], 0),
    )


def _padded(rows: list[list[int]], filler: int) -> torch.Tensor:  # [B, longest] int64
    length = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows], dtype=torch.int64)


def _trained(
    examples: Sequence[Example], starts: Iterable[int]
) -> tuple[torch.Tensor, torch.Tensor]:  # [N], [N]
    """Positions that predict a trained token, and those tokens; example i begins at `starts[i]`."""
    positions, targets = [], []
    for start, example in zip(starts, examples, strict=True):
        for at in range(1, len(example.input_ids)):
            if example.trained[at]:
                positions.append(start + at - 1)
                targets.append(example.input_ids[at])
    return torch.tensor(positions, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)
