"""Host: memory beside the device, for what a lever keeps off it; copies run on a stream of their own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class Host:
    """Gives host memory and moves tensors between it and the device of the model.

    On a GPU the memory is pinned and the copies overlap with arithmetic; on a CPU torch's own synchronous
    stand-ins (torch.cpu.Stream, torch.cpu.Event) run the same code. The memory trace has a subclass whose
    host memory costs the device nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.cuda if device.type == "cuda" else torch.cpu
        self._stream = self._module.Stream()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised host memory."""
        pinned = self.device.type == "cuda"
        return torch.empty(shape, dtype=dtype, pin_memory=pinned)

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised device memory."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Begin `target.copy_(source)` beside the arithmetic; returns the event at which it is done.

        Both must be kept until then: `wait` for the event before either is reused or freed.
        """
        # after what made the source, or last used the target
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = self._module.Event()
            done.record(self._stream)
        return done

    def wait(self, done: Any) -> None:
        """Arithmetic from here on sees what `copy` copied."""
        self._module.current_stream().wait_event(done)

    def at_work(self) -> AbstractContextManager[None]:
        """What is computed within is computed in host memory; a trace counts none of it on the device."""
        return nullcontext()

    def to_device(self, made: torch.Tensor) -> torch.Tensor:
        """A copy on the device of a tensor made in ordinary host memory; itself where both are one."""
        return made.to(self.device, non_blocking=True)

    def added(self, total: torch.Tensor | None, made: torch.Tensor) -> torch.Tensor:
        """`made`, which is on the device, added to a sum in ordinary host memory; None begins one."""
        here = made.to("cpu")
        return here if total is None else total.add_(here)
