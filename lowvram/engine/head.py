"""Heads whose weight is read a tile of vocabulary rows at a time: NF4, int8, or streamed from the host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lowvram.engine.config import TILE_ROWS, Levers
from lowvram.engine.host import Host
from lowvram.engine.int8 import quantized_rows, row_values
from lowvram.engine.nf4 import fill_nf4, nf4_linear, nf4_values


class TiledHead(nn.Module, ABC):
    """A frozen linear layer [V, H]. A subclass says where its rows are kept and how they are read.

    A Linear4bit over all rows would save nothing in training: bitsandbytes dequantises the whole weight for
    the gradient of its input, 1.09 GB of Qwen2-7B's head at the moment of the peak.
    """

    def __init__(self, like: nn.Linear, *, tied: bool) -> None:
        """`like`: the 16-bit head; only its shape and bias are kept. `tied`: the embedding has its weight."""
        super().__init__()
        self.n_rows, self.width, self.dtype = like.out_features, like.in_features, like.weight.dtype
        self.tied = tied
        self.bias = like.bias

    @abstractmethod
    def fill(self, weight: torch.Tensor) -> None:
        """Keep what `weight` [V, H] says in the head's own way."""

    @abstractmethod
    def tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, tile [v, H] on the device); the next one may overwrite it."""

    def spans(self) -> list[tuple[int, int]]:
        """First row and end of each tile."""
        starts = range(0, self.n_rows, TILE_ROWS)
        return [(start, min(start + TILE_ROWS, self.n_rows)) for start in starts]

    def logits(self, hidden: torch.Tensor, start: int, tile: torch.Tensor) -> torch.Tensor:
        """[C, H] -> [C, v]"""
        bias = None if self.bias is None else self.bias[start : start + tile.shape[0]]
        return F.linear(hidden, tile, bias)

    @torch.no_grad()
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # [.., H] -> [.., V]
        """All logits at one time, for answers; training goes through `tiled_loss.TiledLoss`."""
        return torch.cat([self.logits(hidden, start, tile) for start, tile in self.tiles()], dim=-1)


class Nf4Head(TiledHead):
    """One bitsandbytes Linear4bit for each tile of rows."""

    def __init__(self, like: nn.Linear, *, tied: bool, double_quantization: bool) -> None:
        super().__init__(like, tied=tied)
        for start, end in self.spans():
            part = nf4_linear(
                self.width,
                end - start,
                bias=False,
                compute_dtype=self.dtype,
                double_quantization=double_quantization,
            )
            self.add_module(f"rows_{start}", part)  # not "0": a number would be taken for a layer's

    def parts(self) -> list[Any]:
        return [self.get_submodule(f"rows_{start}") for start, _ in self.spans()]

    def fill(self, weight: torch.Tensor) -> None:
        for (start, end), part in zip(self.spans(), self.parts(), strict=True):
            fill_nf4(part, weight[start:end])

    def tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        for (start, _), part in zip(self.spans(), self.parts(), strict=True):
            yield start, nf4_values(part)


class Int8Head(TiledHead):
    """Rows of int8: 1 byte a weight and 4 bytes a row, 545 MB of Qwen2-7B's 1,090."""

    def fill(self, weight: torch.Tensor) -> None:
        values, scale = quantized_rows(weight)  # [V, H], [V, 1]
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        for start, end in self.spans():
            yield start, row_values(self.weight[start:end], self.scale[start:end], self.dtype)


class StreamedHead(TiledHead):
    """The 16-bit weight in host memory; a tile travels while the one before it is computed with.

    `weight` is no parameter: nothing that moves the module takes it to the device.
    """

    weight: torch.Tensor  # [V, H] in host memory

    def __init__(self, like: nn.Linear, *, tied: bool, host: Host) -> None:
        super().__init__(like, tied=tied)
        self.host = host

    def fill(self, weight: torch.Tensor) -> None:
        self.weight = on_host(weight, self.host)

    def tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        spans = self.spans()
        rows = min(TILE_ROWS, self.n_rows)
        buffers = [self.host.on_device((rows, self.width), self.dtype) for _ in range(min(2, len(spans)))]

        def begin(index: int) -> tuple[torch.Tensor, object]:
            start, end = spans[index]
            tile = buffers[index % 2][: end - start]
            return tile, self.host.copy(tile, self.weight[start:end])

        following = begin(0)
        for index, (start, _) in enumerate(spans):
            tile, arrived = following
            self.host.wait(arrived)
            if index + 1 < len(spans):
                following = begin(index + 1)
            yield start, tile


def on_host(weight: torch.Tensor, host: Host) -> torch.Tensor:
    """A copy in host memory."""
    kept = host.empty(tuple(weight.shape), weight.dtype)
    kept.copy_(weight)
    return kept


def tiled_head(like: nn.Linear, levers: Levers, host: Host, *, tied: bool) -> TiledHead:
    """The kind of head that the lever names, still without weights."""
    if levers.head == "nf4":
        return Nf4Head(like, tied=tied, double_quantization=levers.double_quantization)
    if levers.head == "int8":
        return Int8Head(like, tied=tied)
    return StreamedHead(like, tied=tied, host=host)
