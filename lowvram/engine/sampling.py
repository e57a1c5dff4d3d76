"""Sampling: from logits to the next token of each row, reproducible by a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from lowvram.frozen import Frozen

_SEEDS_APART = 1_000_003  # a prime, so that row 1 of seed 0 does not draw what row 0 of seed 1 does


class Sampling(Frozen):
    """How the next token is chosen."""

    temperature: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="0: the likeliest token, nothing is drawn"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="draw from the likeliest tokens that make up this share"
    )
    seed: int = Field(0, ge=0, lt=1 << 32, description="of what is drawn")


class Sampler:
    """Chooses for the rows of one batch. Each draws from a generator of its own, by the row's number.

    So a row's answer depends on the seed and on its place among all rows, not on how they are batched.
    """

    def __init__(self, sampling: Sampling, rows: Sequence[int], device: torch.device) -> None:
        self._sampling = sampling
        seeds = [sampling.seed * _SEEDS_APART + row for row in rows] if sampling.temperature else []
        self._generators = [_generator(seed, device) for seed in seeds]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:  # [B, V] -> [B]
        if not self._sampling.temperature:
            return logits.argmax(-1)
        shares = self._shaped(logits.float()).softmax(-1)
        rows = zip(shares, self._generators, strict=True)
        return torch.cat([torch.multinomial(share, 1, generator=generator) for share, generator in rows])

    def _shaped(self, scores: torch.Tensor) -> torch.Tensor:  # [B, V]
        """transformers' own warpers, in the order in which `generate` applies them."""
        unused = torch.empty(0, dtype=torch.int64, device=scores.device)  # the ids so far
        scores = TemperatureLogitsWarper(self._sampling.temperature)(unused, scores)
        if self._sampling.top_p < 1:
            scores = TopPLogitsWarper(self._sampling.top_p)(unused, scores)
        return scores


def _generator(seed: int, device: torch.device) -> torch.Generator | None:
    """None in a trace, where nothing is drawn."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
