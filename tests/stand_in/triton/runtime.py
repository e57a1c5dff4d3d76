"""Stand-in for triton.runtime: a kernel is a function of numpy arrays, whose temporaries torch never sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class KernelInterface:
    """What `kernel[grid](...)` goes through, as in Triton 3.9."""

    def run(self, *args: Any) -> None:
        raise NotImplementedError

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: self.run(*args)


class JITFunction(KernelInterface):
    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def run(self, *args: Any) -> None:
        assert not any(getattr(arg, "is_meta", False) for arg in args), "a real kernel would read address 0"
        shared = (arg.detach().numpy() if isinstance(arg, torch.Tensor) else arg for arg in args)
        self._function(*shared)
