"""What an adapter does to one tensor of the base: computed in float32, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from lowvram.export.tensor_files import StoredTensor


class Rows(Protocol):
    """A tensor that is read by rows: as stored, or as a quantised base shows it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Some rows: [stop - start, ..]"""

    def spans(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """First row and end of each piece."""


@dataclass(frozen=True)
class LowRank:
    """scaling * B A, kept as the places of its small factors (LoRA, arXiv 2106.09685)."""

    a: StoredTensor  # [r, in]
    b: StoredTensor  # [out, r]
    scaling: float
    turned: bool  # the weight lies as [in, out]: GPT-2's Conv1D; an embedding [V, H] has V in, H out
    magnitude: StoredTensor | None = None  # [out]: DoRA, arXiv 2402.09353

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight as it is stored."""
        shape = self.b.shape[0], self.a.shape[1]
        return (shape[1], shape[0]) if self.turned else shape

    @property
    def n_numbers(self) -> int:
        """Of both factors, which are in memory while one tensor is merged."""
        return sum(self.shape) * self.a.shape[0]

    def merged(self, weight: Rows) -> Iterator[torch.Tensor]:
        """W + scaling * B A by rows, or with DoRA m * (W + scaling * B A) / its rows' norms; in float32."""
        a, b = self.a.whole().float(), self.b.whole().float()
        left, right = (a.T, b.T) if self.turned else (b, a)  # [rows, r], [r, columns]

        def plain() -> Iterator[tuple[slice, torch.Tensor]]:
            for start, stop in weight.spans():
                delta = (left[start:stop] @ right).mul_(self.scaling)
                yield slice(start, stop), delta.add_(weight.rows(start, stop))

        if self.magnitude is None:
            yield from (piece for _, piece in plain())
            return
        magnitude = self.magnitude.whole().float()
        if not self.turned:
            for rows, piece in plain():
                factor = magnitude[rows] / torch.linalg.vector_norm(piece, dim=1)
                yield piece.mul_(factor[:, None])
            return
        squares = torch.zeros(magnitude.shape, dtype=torch.float64)  # of columns: all rows come first
        for _, piece in plain():
            squares += piece.square_().sum(0, dtype=torch.float64)
        factor = magnitude / squares.sqrt_().float()
        for _, piece in plain():
            yield piece.mul_(factor)


@dataclass(frozen=True)
class Change:
    """All that an adapter does to one tensor, in this order."""

    replaced: StoredTensor | None = None  # modules_to_save, or a trained bias
    low_rank: LowRank | None = None
    added: StoredTensor | None = None  # lora_bias, times `scaling`
    scaling: float = 1.0
    token_rows: StoredTensor | None = None  # [n, H]: these rows' new values
    token_ids: tuple[int, ...] = ()

    @property
    def only_token_rows(self) -> bool:
        return self.token_rows is not None and not (self.replaced or self.low_rank or self.added)

    def merged(self, weight: Rows) -> Iterator[torch.Tensor]:
        """The changed tensor by rows, in float32."""
        source: Rows = self.replaced or weight
        if self.low_rank is not None:
            pieces = self.low_rank.merged(source)
        else:
            pieces = (source.rows(*span).float() for span in source.spans())
        start = 0
        for piece in pieces:
            stop = start + (piece.shape[0] if piece.ndim else 1)
            if self.added is not None:
                piece = piece + self.added.rows(start, stop).float() * self.scaling
            if self.token_rows is not None:
                self._put_tokens(piece, start, stop)
            yield piece
            start = stop

    def _put_tokens(self, piece: torch.Tensor, start: int, stop: int) -> None:
        assert self.token_rows is not None
        for at, token in enumerate(self.token_ids):
            if start <= token < stop:
                piece[token - start] = self.token_rows.rows(at, at + 1)[0].float()
