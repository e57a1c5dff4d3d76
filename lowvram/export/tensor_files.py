"""Tensors of safetensors files, read by rows with plain reads: what is not asked for takes no memory."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from lowvram.engine.source import (
    INDEX_FILE,
    local_shards,
    no_safetensors,
    read_safetensors_header,
    weight_map,
)
from lowvram.errors import ConfigError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE_NUMBERS = 1 << 20  # read, changed and written at one time; four times as many are no faster
_AGAIN = "Download it again."


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. It is read with plain reads: pages of a mapped file would count as our memory."""

    file: Path
    name: str
    offset: int  # of its first byte in the file
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def n_rows(self) -> int:
        """Along its first dimension; a number has one."""
        return self.shape[0] if self.shape else 1

    def rows(self, start: int, stop: int) -> torch.Tensor:  # [stop - start, ..]
        """Some rows, as stored."""
        row_bytes = self.n_bytes // max(self.n_rows, 1)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        buffer = bytearray((stop - start) * row_bytes)
        if not buffer:
            return torch.empty(shape, dtype=self.dtype)
        with self.file.open("rb", buffering=0) as handle:
            handle.seek(self.offset + start * row_bytes)
            view = memoryview(buffer)
            while view:
                n_read = handle.readinto(view)
                if not n_read:
                    raise ConfigError(f"'{self.file}' has become shorter.", _AGAIN)
                view = view[n_read:]
        return torch.frombuffer(buffer, dtype=self.dtype).reshape(shape)

    def whole(self) -> torch.Tensor:
        return self.rows(0, self.n_rows)

    def spans(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """First row and end of each piece of about `PIECE_NUMBERS`, but the last of a multiple of rows."""
        width = max(prod(self.shape[1:]), 1)
        step = max(PIECE_NUMBERS // width // multiple, 1) * multiple
        for start in range(0, self.n_rows, step):
            yield start, min(start + step, self.n_rows)


def tensors_of_file(file: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of one safetensors file, in the order in which they lie there.

    Raises:
        ConfigError: it is no safetensors file, is cut off, or its header contradicts itself.
    """
    with file.open("rb") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little")
    try:
        header = read_safetensors_header(file)
        entries = sorted(header.items(), key=lambda item: int(item[1]["data_offsets"][0]))
        return {name: _tensor(file, name, start, entry) for name, entry in entries}
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise ConfigError(f"'{file}' has a broken safetensors header.", _AGAIN) from error


def _tensor(file: Path, name: str, start: int, entry: dict[str, Any]) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ConfigError(
            f"'{name}' in '{file}' is stored as {entry['dtype']}, which lowvram does not read.",
            "Use a base in 16 or 32 bits.",
        )
    begin, end = entry["data_offsets"]
    made = StoredTensor(file, name, start + begin, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    if begin < 0 or end - begin != made.n_bytes or min(made.shape, default=0) < 0:
        raise ConfigError(
            f"'{name}' in '{file}' has {end - begin:,} bytes by its place and {made.n_bytes:,} by its "
            f"shape {list(made.shape)} in {entry['dtype']}.",
            _AGAIN,
        )
    return made


def name_in_file(name: str, stored: Container[str]) -> str:
    """GPT-2's file on the hub says "h.0.attn" where the model says "transformer.h.0.attn"."""
    shorter = name.partition(".")[2]
    return shorter if name not in stored and shorter in stored else name


def tensors_of_folder(folder: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of a model folder, file by file.

    Raises:
        ConfigError: no safetensors, or they are not those that the index lists.
    """
    found: dict[str, StoredTensor] = {}
    for shard in local_shards(folder):
        tensors = tensors_of_file(shard)
        if twice := sorted(found.keys() & tensors.keys()):
            raise ConfigError(
                f"'{found[twice[0]].file}' and '{shard.name}' both hold '{twice[0]}'.",
                "Download the model again; which of them is right nobody can tell.",
            )
        found.update(tensors)
    if not found:
        raise no_safetensors(folder, "Give a base with safetensors weights: --base PATH")
    missing = sorted(set(weight_map(folder)) - set(found))
    if missing:
        raise ConfigError(
            f"'{folder / INDEX_FILE}' lists {len(missing)} tensors that no file holds, first '{missing[0]}'.",
            "Download the model again.",
        )
    return found
