"""Recorder: sees every operator of a step that runs on the meta device and follows each new storage."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.memory.kernels import HIDING, hidden_bytes
from lowvram.memory.trace import ALLOC_ROUNDING, OUTSIDE, Allocation, Backend, Trace, round_up

_ALIASING = {"aten._unsafe_view.default"}  # returns its input's storage although its schema does not say so
_EFFICIENT_BACKWARD = torch.ops.aten._efficient_attention_backward.default


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows each new storage until it is released. `phase` is set by the caller.

    Storages on the host (`exclude`) and views cost nothing. Operators that an operator calls inside are not
    seen: what those allocate is in `kernels.hidden_bytes`.
    """

    def __init__(self, backend: Backend, rounding: int = ALLOC_ROUNDING) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.phase = "load"
        self._module, self._layer = "", OUTSIDE
        self._backend: Backend = backend
        self._rounding = rounding
        self._index_of: dict[int, int] = {}  # storage address -> allocation
        self._host: set[int] = set()
        self._held: list[Any] = []  # hooks, to be removed
        self._me = weakref.ref(self)  # what finalizers hold: the model's storages outlive the recording
        self._owners: dict[int, str] = {}  # storage address -> the module whose events its operators are
        self._vocab_size = -1
        self._running = False
        self._aside = False
        self._outputs = _OutputShapes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._running:
            return func(*args, **(kwargs or {}))
        self._running = True
        try:
            result = self._outputs.of(func, args, kwargs or {})
        finally:
            self._running = False
        if self._owners and args and isinstance(args[0], torch.Tensor):
            self.at(self._owners.get(_key(args[0]), self._module))
        name = _name(func)
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, torch.Tensor):
                self._record(leaf, name)
        if name in HIDING and (temporary := hidden_bytes(name, args, self._backend)):
            self._transient(temporary, name)
        return result

    def watch(self, model: nn.Module, vocab_size: int) -> None:
        """Follow which module runs, forward and backward, and tell logits by their last dimension."""
        self._vocab_size = vocab_size
        for name, module in model.named_modules():
            layer = layer_of(name)
            self.hold(module.register_forward_pre_hook(self._enter(name, layer)))
            if layer != OUTSIDE and name.endswith(f".{layer}"):
                self.hold(module.register_forward_hook(self._leave(name, layer)))

    def hold(self, hook: Any) -> None:
        """Something with `remove()`, that goes when the recording is over."""
        self._held.append(hook)

    def let_go(self) -> None:
        """The recording is over: the model is as it was before."""
        for hook in self._held:
            hook.remove()
        self._held = []

    def at(self, name: str) -> None:
        """Say by hand which module the next events belong to."""
        self._module, self._layer = name, layer_of(name)

    def label(self, tensor: torch.Tensor, component: str) -> None:
        """Record `tensor`'s storage (once) as part of `component`."""
        self._record(tensor, component)
        index = self._index_of.get(_key(tensor))
        if index is not None:
            self.trace.allocations[index].component = component

    def own(self, tensor: torch.Tensor, module: str) -> None:
        """Operators that start from `tensor` are `module`'s, whichever module ran last."""
        self._owners[_key(tensor)] = module

    def owner_of(self, tensor: torch.Tensor) -> str:
        """As `own` was told, "" if it was not."""
        return self._owners.get(_key(tensor), "")

    def exclude(self, tensor: torch.Tensor) -> None:
        """This storage lives in host memory, or is counted elsewhere."""
        self.release(_key(tensor))
        self._exclude(tensor.untyped_storage())

    def _exclude(self, storage: torch.UntypedStorage) -> None:
        key = int(storage._cdata)
        self._host.add(key)
        weakref.finalize(storage, self._host.discard, key)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is made while the context lasts lives in host memory."""
        self._aside = True
        yield
        self._aside = False

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        outer, self.phase = self.phase, phase
        if phase == "backward":
            self.trace.backward_starts.append(len(self.trace.events))
        try:
            yield
        finally:
            self.phase = outer

    @contextmanager
    def temporary(self, n_bytes: int, op: str, bytes_by_layer: tuple[int, ...] = ()) -> Iterator[None]:
        """Something of `n_bytes` that no dispatcher sees exists while the context lasts."""
        index = self.keep(n_bytes, op, bytes_by_layer)
        yield
        self.trace.free(index, self._layer)

    def keep(self, n_bytes: int, op: str, bytes_by_layer: tuple[int, ...] = ()) -> int:
        """Something of `n_bytes` that no dispatcher sees exists from now on; returns its allocation."""
        rounded = round_up(n_bytes, self._rounding)
        allocation = Allocation(rounded, self.phase, self._module, op, "workspaces")
        allocation.bytes_by_layer = bytes_by_layer
        return self.trace.allocate(allocation, self._layer)

    def _enter(self, name: str, layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            self._module, self._layer = name, layer

        return hook

    def _leave(self, name: str, layer: int) -> Any:
        """The gradient of a layer's output arrives when the layer's backward begins."""

        def begins(_gradient: torch.Tensor) -> None:
            self._module, self._layer = name, layer

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(begins)  # type: ignore[no-untyped-call]

        return hook

    def _record(self, tensor: torch.Tensor, op: str) -> None:
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key in self._index_of or key in self._host:
            return
        if self._aside:
            self._exclude(storage)
            return
        n_bytes = round_up(storage.nbytes(), self._rounding)
        if not n_bytes:
            return
        is_logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size
        allocation = Allocation(n_bytes, self.phase, self._module, op, "logits" if is_logits else None)
        self._index_of[key] = self.trace.allocate(allocation, self._layer)
        weakref.finalize(storage, _release, self._me, key)

    def release(self, key: int) -> None:
        """The storage at this address is gone."""
        index = self._index_of.pop(key, None)
        if index is not None:
            self.trace.free(index, self._layer)

    def _transient(self, n_bytes: int, op: str) -> None:
        with self.temporary(n_bytes, op):
            pass


class _OutputShapes:
    """Remembers what an operator returns for inputs of some shapes: a third of the time of asking torch."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self._fresh: dict[Any, bool] = {}  # whether all that the operator returns is newly allocated
        self._in_place: dict[Any, bool] = {}  # whether it only writes into its first input

    def of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _EFFICIENT_BACKWARD:  # torch 2.13's shapes know no `out`: scale would come twice
            kwargs = {name: value for name, value in kwargs.items() if name != "scale"}
        fresh = self._fresh.get(func)
        if fresh is None:
            fresh = self._fresh[func] = _returns_fresh(func)
            self._in_place[func] = _writes_first(func)
        if self._in_place[func] and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return args[0]  # there is nothing to write; torch would take 1 ms to decompose an addmm_
        key = _signature(args, kwargs) if fresh else None
        if key is None:
            return func(*args, **kwargs)
        known = self._known.get((func, key))
        if known is None:
            result = func(*args, **kwargs)
            known = self._known[(func, key)] = _layout(result)
            return result
        if isinstance(known, list):
            return tuple(_made(item) for item in known)
        return _made(known)


@cache
def layer_of(module: str) -> int:
    """3 for "model.layers.3.mlp.up_proj", OUTSIDE where no number is."""
    return next((int(part) for part in module.split(".") if part.isdigit()), OUTSIDE)


_NAMES: dict[Any, str] = {}


def _name(func: Any) -> str:
    name = _NAMES.get(func)
    if name is None:
        name = _NAMES[func] = str(func)
    return name


def _returns_fresh(func: Any) -> bool:
    schema = func._schema
    aliases = any(v.alias_info is not None for v in (*schema.arguments, *schema.returns))
    takes_tensor = any("Tensor" in str(v.type) for v in schema.arguments)  # the others may want any device
    return takes_tensor and not aliases and _name(func) not in _ALIASING


def _writes_first(func: Any) -> bool:
    """Returns its first input with other values; one that changes its shape does not count."""
    arguments, returns = func._schema.arguments, func._schema.returns
    if not arguments or len(returns) != 1 or torch.Tag.inplace_view in func.tags:
        return False
    first, back = arguments[0].alias_info, returns[0].alias_info
    others = any(a.alias_info is not None and a.alias_info.is_write for a in arguments[1:])
    named = _name(func).split(".")[1].endswith("_")
    return (
        named and not others and first is not None and back is not None and first.is_write and back.is_write
    )


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A hashable description of meta inputs; None for other tensors and what cannot be hashed."""
    try:
        return tuple(_described(a) for a in args), tuple((k, _described(v)) for k, v in kwargs.items())
    except TypeError:
        return None


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, nn.Parameter) or not value.is_meta:
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_described(item) for item in value)
    hash(value)
    return type(value), value


def _layout(result: Any) -> Any:
    """(shape, stride, dtype) of each output; other outputs as they are."""
    if isinstance(result, (list, tuple)):
        return [_layout(item) for item in result]
    if isinstance(result, torch.Tensor):
        return _Layout((tuple(result.shape), result.stride(), result.dtype))
    return result


class _Layout(tuple):  # type: ignore[type-arg]
    """Told apart from an operator's plain outputs by its type."""


def _made(layout: Any) -> Any:
    if isinstance(layout, _Layout):
        return torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")
    return layout


def _release(recorder: weakref.ref[Recorder], key: int) -> None:
    if (living := recorder()) is not None:
        living.release(key)


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
