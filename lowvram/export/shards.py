"""Writes tensors that come in pieces as safetensors files of a chosen size, with their index."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lowvram.engine.source import INDEX_FILE, SINGLE_FILE
from lowvram.export.tensor_files import NAMES

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class NamedPieces:
    """A tensor that is made while it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[torch.Tensor]]  # its rows in order, in `dtype`

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_shards(tensors: list[NamedPieces], folder: Path, max_shard_bytes: int, progress: Progress) -> None:
    """The tensors in their order, in files of at most `max_shard_bytes` (or one larger tensor)."""
    groups = _grouped(tensors, max_shard_bytes)
    total, done = sum(tensor.n_bytes for tensor in tensors), 0
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = shard_name(number, len(groups))
        with (folder / file).open("wb") as handle:
            _write_header(handle, group)
            for tensor in group:
                for piece in tensor.pieces():
                    done += handle.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                    progress(done, total)
                weight_map[tensor.name] = file
            handle.flush()
            os.fsync(handle.fileno())
    write_index(folder, weight_map, total)


def shard_name(number: int, count: int) -> str:
    """As transformers names them."""
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    """Which file holds which tensor; a single file needs none."""
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _grouped(tensors: list[NamedPieces], max_shard_bytes: int) -> list[list[NamedPieces]]:
    groups: list[list[NamedPieces]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.n_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.n_bytes
    return groups


def _write_header(handle: BinaryIO, group: list[NamedPieces]) -> None:
    """safetensors' own layout: 8 bytes of length, a JSON table, then the tensors one after another."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in group:
        end = offset + tensor.n_bytes
        table[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    handle.write(struct.pack("<Q", len(text)) + text)
