"""What an exporter reads: a model's tensors by name, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch


class Tensors(Protocol):
    """A model on disk, with an adapter added where there is one; `MergedTensors` is one."""

    @property
    def folder(self) -> Path:
        """The base's local folder: config, tokenizer."""

    @property
    def names(self) -> list[str]:
        """In file order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading its values."""

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Some rows at a time, merged in float32, rounded once to the stored dtype."""
