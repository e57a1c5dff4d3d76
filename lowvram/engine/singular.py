"""The largest singular values of a matrix and their vectors, by a seeded randomised method."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch


class Singular(NamedTuple):
    """M ~ U diag(S) V^T, the largest values first."""

    u: torch.Tensor  # [m, q]
    s: torch.Tensor  # [q]
    v: torch.Tensor  # [n, q]


def largest(matrix: torch.Tensor, q: int, rounds: int, seed: int) -> Singular:
    """torch.svd_lowrank's, with random numbers of its own (Halko et al., arXiv 0909.4061, algorithm 5.1).

    Args:
        matrix: [m, n], of which no copy is made.
        q: how many; as many as there are where that is less.
        rounds: of power iteration: each makes what lies beyond the q-th smaller.
    """
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return Singular(*torch.svd_lowrank(matrix, q=min(q, *matrix.shape), niter=rounds))


def seed_of(seed: int, name: str) -> int:
    """A layer's own, whichever layers are worked on before it."""
    return zlib.crc32(name.encode(), seed & 0xFFFFFFFF)
