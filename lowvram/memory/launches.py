"""Triton kernels of a traced step: launched on meta tensors they do nothing, for they allocate nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def no_launches_on_meta() -> Iterator[None]:
    """While the context lasts a launch `kernel[grid](...)` that is given a meta tensor returns at once.

    What a launch writes to was allocated before, by torch, in Python that runs as it does on a GPU. Launches
    on tensors with bytes go on, whoever makes them. Triton's base class is the one place through which its
    compiler's, its autotuner's and its interpreter's launches go.
    """
    from triton.runtime import KernelInterface

    own: Callable[[Any, Any], Callable[..., Any]] = KernelInterface.__getitem__

    def launcher(kernel: Any, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            if any(isinstance(value, torch.Tensor) and value.is_meta for value in given):
                return None
            return own(kernel, grid)(*args, **kwargs)

        return launch

    KernelInterface.__getitem__ = launcher
    try:
        yield
    finally:
        KernelInterface.__getitem__ = own
