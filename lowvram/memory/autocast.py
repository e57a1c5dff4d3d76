"""Autocast to bf16 on meta tensors, for which torch has none: the same casts, with the same weight cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

_LOW_PRECISION = {  # of torch's list, what language models call; attention's kernels cast by themselves
    F.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.bmm,
}


class Bf16Autocast(TorchFunctionMode):
    """Within this mode `torch.is_autocast_enabled()` holds and matrix products take bf16.

    As in torch, the cast of a leaf that asks for a gradient is kept until the outermost context ends; every
    other cast is made anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self._casts: dict[int, torch.Tensor] = {}

    def __enter__(self) -> Any:
        torch.set_autocast_enabled("cuda", True)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_autocast_enabled("cuda", False)
        self._casts.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOW_PRECISION:
            args = tuple(self._cast(a) for a in args)
            kwargs = {k: self._cast(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(torch.bfloat16)
        return self._casts[id(value)]


@contextmanager
def _unless_enabled() -> Iterator[None]:
    entered: AbstractContextManager[Any] = (
        nullcontext() if torch.is_autocast_enabled("cuda") else Bf16Autocast()
    )
    with entered:
        yield


def keep_in_recomputation(model: nn.Module) -> None:
    """A checkpointed layer computes under autocast the second time too, with a cache that ends with it."""
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = _under_autocast(module._gradient_checkpointing_func)  # type: ignore[arg-type]


def _under_autocast(checkpoint: Callable[..., Any]) -> Any:
    def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
        def run(*inputs: Any) -> Any:
            with _unless_enabled():
                return function(*inputs)

        return checkpoint(run, *args)

    return checkpointed
