"""EVA: A from the principal directions of what a layer reads, found batch after batch (arXiv 2410.07170)."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowvram.engine.adapter_start import set_capture
from lowvram.engine.batch import Batch
from lowvram.engine.loss import exact
from lowvram.engine.singular import largest

_ROUNDS = 4  # of power iteration, and twice the rank: as peft's own EVA
_MORE = 2


class Directions:
    """The first k principal directions of rows that come in batches (Ross et al. 2008, as EVA uses it).

    What is known is k rows, each a direction times its singular value. A batch, less its mean, is put under
    them with one row for how far the mean has moved, and all is decomposed again. peft's IncrementalPCA does
    the same with a decision on values in it, which a memory trace has none of.
    """

    def __init__(self, k: int, seed: int) -> None:
        self._k, self._seed = k, seed
        self._rows: torch.Tensor | None = None  # [k, in]
        self._mean: torch.Tensor | None = None  # [in]
        self._seen = 0

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:  # [n, in]
        """Fewer rows than k are passed over, as in peft."""
        n = x.shape[0]
        if n < self._k:
            return
        rows = x.to(exact(x), copy=True)
        mean = rows.mean(dim=0)
        rows -= mean
        if self._rows is not None and self._mean is not None:
            seen, both = self._seen, self._seen + n
            moved = (self._mean - mean) * (seen * n / both) ** 0.5
            rows = torch.cat([self._rows, rows, moved[None]])
            mean = (self._mean * seen + mean * n) / both
        found = largest(rows, _MORE * self._k, _ROUNDS, self._seed)
        self._rows = found.s[: self._k, None] * found.v[:, : self._k].t()
        self._mean, self._seen = mean, self._seen + n

    def found(self) -> torch.Tensor | None:  # -> [k, in]
        """Of length 1, their largest number positive; None if no batch was large enough."""
        if self._rows is None:
            return None
        unit = nn.functional.normalize(self._rows, dim=1)
        largest_at = unit.abs().argmax(dim=1, keepdim=True)
        return unit * unit.gather(1, largest_at).sign()


def principal_directions(
    loss_of: nn.Module,
    layers: Mapping[str, Any],
    batches: Sequence[Batch],
    rank: int,
    seed: int,
    device: torch.device,
) -> dict[str, Directions]:
    """Of every adapted layer's inputs at the trained positions, from an evaluation pass of each batch.

    Neighbours that read the same tensor, such as q, k and v, share their directions.
    """
    reader = _Reader(rank, seed)
    was_training = loss_of.training
    loss_of.eval()
    for name, layer in layers.items():
        set_capture(layer, reader.for_layer(name, layer))
    try:
        with torch.no_grad():
            for batch in batches:
                moved = batch.to(device)
                reader.positions = moved.positions
                loss_of(*moved.tensors, lengths=moved.lengths)
    finally:
        for layer in layers.values():
            set_capture(layer, None)
        loss_of.train(was_training)
    return {name: reader.of(name) for name in layers}


class _Reader:
    """Hears what the layers read."""

    def __init__(self, rank: int, seed: int) -> None:
        self._rank, self._seed = rank, seed
        self.positions: torch.Tensor | None = None  # [N] of the batch at hand
        self._leader: dict[str, str] = {}  # a layer -> the one whose input it reads
        self._known: dict[str, Directions] = {}  # of leaders
        self._last: tuple[str, Any] = ("", lambda: None)  # whose input was read last, and a weak reference

    def for_layer(self, name: str, layer: Any) -> Any:
        def read(x: torch.Tensor) -> torch.Tensor:  # [.., in] -> [.., out]
            self._hear(name, x)
            output: torch.Tensor = layer.base_layer(x)
            return output

        return read

    def _hear(self, name: str, x: torch.Tensor) -> None:
        leader, last = self._last
        if last() is x:
            self._leader[name] = leader
            return
        self._last = (name, weakref.ref(x))
        assert self.positions is not None
        rows = x.reshape(-1, x.shape[-1]).index_select(0, self.positions)
        self._known.setdefault(name, Directions(self._rank, self._seed)).update(rows)

    def of(self, name: str) -> Directions:
        return self._known[self._leader.get(name, name)]
