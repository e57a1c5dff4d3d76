"""Workload: what an optimizer step reads, in tokens; the same numbers for every candidate of a search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from lowvram.data.padding import padded_share, rows_per_step
from lowvram.data.stats import DataStats


class Tokens(NamedTuple):
    """Tokens of one optimizer step and the forward passes that they go through."""

    computed: float  # padding included
    trained: float
    squares: float  # sum over the examples of their lengths' squares, for attention
    passes: float


@dataclass(frozen=True)
class Workload:
    """The examples of one optimizer step, none longer than `seq_len`."""

    quantiles: tuple[int, ...]  # lengths of the examples at 0, 1, ... 100 %
    seq_len: int
    effective_batch: int
    trained_share: float = 1.0  # part of the tokens that the loss counts

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        return tuple(min(n, self.seq_len) for n in self.quantiles)

    @cached_property
    def _of_all(self) -> tuple[float, float]:
        """Tokens of the step's examples, and their squares."""
        share = self.effective_batch / len(self._lengths)
        return share * sum(self._lengths), share * sum(n * n for n in self._lengths)

    @cache  # noqa: B019  # a few objects, each for a run of the planner
    def tokens(self, micro_batch: int, packing: bool) -> Tokens:
        """Of one step in micro-batches of `micro_batch` examples, or in packed rows of as many lengths."""
        tokens, squares = self._of_all
        trained = self.trained_share * tokens
        if packing:
            return Tokens(tokens, trained, squares, self._rows(micro_batch))
        longer = 1 / (1 - self.padding(micro_batch))
        return Tokens(longer * tokens, trained, longer**2 * squares, self.effective_batch / micro_batch)

    def padding(self, micro_batch: int) -> float:
        """Share of padding among the tokens that are computed without packing."""
        return padded_share(self.quantiles, **self._of(micro_batch))

    def _rows(self, micro_batch: int) -> float:
        return rows_per_step(self.quantiles, **self._of(micro_batch))

    def _of(self, micro_batch: int) -> dict[str, int]:
        return {
            "micro_batch": micro_batch,
            "effective_batch": self.effective_batch,
            "seq_len": self.seq_len,
        }

    def tiles(self, tile_tokens: int) -> float:
        """Tiles of an average example; 1 without tiling."""
        if not tile_tokens:
            return 1.0
        return sum(-(-n // tile_tokens) for n in self._lengths) / len(self._lengths)


def workload(stats: DataStats | None, seq_len: int, effective_batch: int) -> Workload:
    """From the data's lengths; without data every example is as long as it may be."""
    if stats is None:
        return Workload((seq_len, seq_len), seq_len, effective_batch)
    return Workload(stats.length_quantiles, seq_len, effective_batch, stats.trained_share)
