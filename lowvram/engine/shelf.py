"""Shelf: tensors that wait for their turn, on the device or on the host, each fetched a step ahead."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from lowvram.engine.host import Host


class Shelf:
    """Keeps tensors by key.

    Without a host it keeps them as they are. With one it copies each to host memory while the arithmetic goes
    on, and brings it back likewise: on the device lie the tensor that is worked on, the one that leaves and
    the one that comes.
    """

    def __init__(self, host: Host | None) -> None:
        self._host = host
        self._kept: dict[Hashable, torch.Tensor] = {}  # on the host where there is one
        self._leaving: tuple[torch.Tensor, Any] | None = None  # with the event at which its copy is done
        self._coming: dict[Hashable, tuple[torch.Tensor, Any]] = {}

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        if self._host is None:
            self._kept[key] = tensor
            return
        self._let_leave()
        kept = self._kept[key] = self._host.empty(tuple(tensor.shape), tensor.dtype)
        self._leaving = tensor, self._host.copy(kept, tensor)

    def get(self, key: Hashable, *soon: Hashable) -> torch.Tensor:
        """The tensor, which stays on the shelf.

        Args:
            soon: what will be asked for next: it comes while the caller works on this one.
        """
        if self._host is None:
            return self._kept[key]
        tensor, done = self._coming.pop(key) if key in self._coming else self._fetch(key)
        for other in soon:
            self._coming[other] = self._fetch(other)
        self._host.wait(done)
        return tensor

    def drop(self, key: Hashable) -> None:
        """Forget a tensor: nobody will ask for it again."""
        self._kept.pop(key)

    def clear(self) -> None:
        self._let_leave()
        self._kept.clear()
        self._coming.clear()

    def _fetch(self, key: Hashable) -> tuple[torch.Tensor, Any]:
        assert self._host is not None
        self._let_leave()  # it may be this one
        kept = self._kept[key]
        tensor = self._host.on_device(tuple(kept.shape), kept.dtype)
        return tensor, self._host.copy(tensor, kept)

    def _let_leave(self) -> None:
        """Free the device's side of what was put last, once its copy is done."""
        if self._leaving is not None and self._host is not None:
            self._host.wait(self._leaving[1])
            self._leaving = None
