"""Runs TRL's and torchtune's OffloadActivations on meta tensors: no streams, and a host without bytes.

Their code decides what goes to the host, when it comes back and how long it stays. Left out is what makes the
real step larger: record_stream, which defers a free, and that another stream's blocks are not shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from lowvram.memory.recorder import Recorder


@contextmanager
def offloading_on(recorder: Recorder, module: Any) -> Iterator[None]:
    """`module`, in which a project's OffloadActivations is, sees a GPU whose tensors are on meta."""
    with (
        patch.object(module, "torch", _Torch(recorder)),
        patch.object(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata, create=True),
        patch.object(torch.Tensor, "record_stream", lambda _tensor, _stream: None, create=True),
    ):
        yield


class _Torch:
    """torch, but for what the manager asks of a device."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.accelerator = _Accelerator()
        self.cuda = _Device()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def get_device_module(self, _kind: str) -> _Device:
        return self.cuda

    def empty(self, *shape: Any, dtype: torch.dtype, **_on_host: Any) -> torch.Tensor:
        return self._pinned(lambda: torch.empty(*shape, dtype=dtype, device="meta"))

    def empty_like(self, tensor: torch.Tensor, **_on_host: Any) -> torch.Tensor:
        return self._pinned(lambda: torch.empty_like(tensor))

    def _pinned(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self._recorder.aside():
            return make().as_subclass(_OnHost)


class _OnHost(torch.Tensor):
    def to(self, *_device: Any, **_options: Any) -> torch.Tensor:
        """On the device again, in memory of its own."""
        return torch.empty_like(self.as_subclass(torch.Tensor))


class _Accelerator:
    def current_accelerator(self) -> torch.device:
        return torch.device("meta")


class _Stream:
    def _nothing(self, *_other: Any) -> None:
        return None

    wait_stream = wait_event = record_event = synchronize = _nothing


class _Device:
    """torch.cuda: every stream does its work at once."""

    Stream = default_stream = current_stream = _Stream

    def stream(self, _stream: _Stream) -> nullcontext[None]:
        return nullcontext()

    def empty_cache(self) -> None:
        return None
