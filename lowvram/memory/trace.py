"""Trace: every allocation and free of one training step, recorded while it runs on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowvram.memory.kernels import Backend, hidden_bytes

ALLOC_ROUNDING = 512  # the CUDA caching allocator's smallest unit, bytes


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(slots=True)
class Allocation:
    """One storage's life. `born` and `died` index the event list; `died` is None while it lives."""

    n_bytes: int
    phase: str  # load, forward, backward, clip, optimizer
    module: str  # the module that ran last, "layers.3.mlp.down_proj"
    op: str
    component: str | None = None  # None: decided by its life, see `estimate.component_of`
    born: int = 0
    died: int | None = None


@dataclass
class Trace:
    """Allocations and the order of events: +i allocates allocation i-1, -i frees it."""

    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    backward_starts: list[int] = field(default_factory=list)  # event index at which each backward began

    def allocate(self, allocation: Allocation) -> int:
        allocation.born = len(self.events)
        self.allocations.append(allocation)
        self.events.append(len(self.allocations))
        return len(self.allocations) - 1

    def free(self, index: int) -> None:
        self.allocations[index].died = len(self.events)
        self.events.append(-(index + 1))


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator's outputs and follows each new storage until it is released.

    Storages on the host (`exclude`) and views cost nothing. `phase` is set by the caller.
    """

    def __init__(self, backend: Backend, rounding: int = ALLOC_ROUNDING) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.phase = "load"
        self.module = ""
        self._backend = backend
        self._rounding = rounding
        self._index_of: dict[int, int] = {}  # storage address -> allocation
        self._host: set[int] = set()
        self._vocab_size = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._record(leaf, str(func))
        temporary = hidden_bytes(func, args, self._backend)
        if temporary:
            self._transient(temporary, str(func))
        return result

    def watch(self, model: nn.Module, vocab_size: int) -> None:
        """Follow which module runs, and tell logits by their last dimension."""
        self._vocab_size = vocab_size
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._enter(name))

    def label(self, tensor: torch.Tensor, component: str) -> None:
        """Record `tensor`'s storage (once) as part of `component`."""
        self._record(tensor, component)
        index = self._index_of.get(_key(tensor))
        if index is not None:
            self.trace.allocations[index].component = component

    def exclude(self, tensor: torch.Tensor) -> None:
        """This storage lives in host memory."""
        self._host.add(_key(tensor))

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        outer, self.phase = self.phase, phase
        if phase == "backward":
            self.trace.backward_starts.append(len(self.trace.events))
        try:
            yield
        finally:
            self.phase = outer

    def _enter(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            self.module = name

        return hook

    def _record(self, tensor: torch.Tensor, op: str) -> None:
        key = _key(tensor)
        if key in self._index_of or key in self._host:
            return
        storage = tensor.untyped_storage()
        n_bytes = round_up(storage.nbytes(), self._rounding)
        if not n_bytes:
            return
        is_logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size
        allocation = Allocation(n_bytes, self.phase, self.module, op, "logits" if is_logits else None)
        self._index_of[key] = self.trace.allocate(allocation)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        index = self._index_of.pop(key, None)
        if index is not None:
            self.trace.free(index)

    def _transient(self, n_bytes: int, op: str) -> None:
        n_bytes = round_up(n_bytes, self._rounding)
        self.trace.free(self.trace.allocate(Allocation(n_bytes, self.phase, self.module, op, "workspaces")))


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
