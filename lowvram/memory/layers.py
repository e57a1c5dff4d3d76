"""Extends the trace of a few layers to all of them, event by event.

Four blocks are traced: the first, two in the middle and the last; a block is one layer, or one period where
layers alternate (Gemma). What happens in the third happens again in every further middle block, with tensors
of its own. So its events are repeated once for each; a tensor that a neighbour made is replaced by the one
that the neighbour's repetition made. The result is replayed through the allocator like a trace of the whole
model, and is equal to it byte by byte, at a fraction of its time.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from lowvram.memory.trace import ALLOC_ROUNDING, OUTSIDE, Allocation, Trace, round_up

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_REPEATED = 2  # the block whose events are repeated
_LAST = 3
# Settings that make single layers different without a list that says which.
_IRREGULAR = ("first_k_dense_replace", "mlp_only_layers", "full_attn_idxs", "cross_attention_layers")


class NotRepeatable(Exception):  # noqa: N818  # not an error: the caller traces the whole model instead
    """The layers do not run one after another, or differ in what they allocate."""


@dataclass(frozen=True)
class Blocks:
    """How a model's layers repeat: `n_blocks` of `period` layers, the first one with what is left over."""

    n_layers: int
    period: int

    @property
    def n_blocks(self) -> int:
        return self.n_layers // self.period

    @property
    def traced_layers(self) -> int:
        return 4 * self.period + self.n_layers % self.period

    def block_of(self, layer: int) -> int:
        """Of a traced layer: 0 to 3."""
        left_over = self.n_layers % self.period
        return layer if layer == OUTSIDE else max(layer - left_over, 0) // self.period


def blocks_of(config: PretrainedConfig) -> Blocks | None:
    """How the layers of this model repeat; None when they do not, or are too few to save anything."""
    text = config.get_text_config()
    if config.is_encoder_decoder or any(getattr(text, name, None) for name in _IRREGULAR):
        return None
    n_layers = int(text.num_hidden_layers)
    lists = [v for v in vars(text).values() if _is_per_layer(v, n_layers)]
    steps = max(int(getattr(text, "decoder_sparse_step", 1) or 1), 1)
    periods = (p for p in range(steps, n_layers) if p % steps == 0)
    period = next((p for p in periods if all(_repeats(v, p) for v in lists)), None)
    if period is None or 4 * period + n_layers % period >= n_layers:
        return None
    return Blocks(n_layers, period)


def _is_per_layer(value: Any, n_layers: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == n_layers


def _repeats(values: Any, period: int) -> bool:
    return all(a == b for a, b in zip(values, values[period:], strict=False))


def with_layers(config: PretrainedConfig, n_layers: int) -> PretrainedConfig:
    """The same model with its first `n_layers` layers."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    lists = {k: v for k, v in vars(text).items() if _is_per_layer(v, int(text.num_hidden_layers))}
    text.num_hidden_layers = n_layers
    for name, values in lists.items():
        setattr(text, name, values[:n_layers])
    return short


def trace_repeating(config: PretrainedConfig, trace: Callable[[PretrainedConfig], Trace]) -> Trace:
    """The whole model's trace: extended from a few layers where they repeat, else of every layer."""
    blocks = blocks_of(config)
    if blocks is not None:
        with suppress(NotRepeatable):
            return extend(trace(with_layers(config, blocks.traced_layers)), blocks)
    return trace(config)


@dataclass
class _Run:
    """Consecutive events of one block."""

    layer: int
    sweep: int  # which sweep over the layers: loading, forward, backward, ...
    events: list[int] = field(default_factory=list)


def extend(trace: Trace, blocks: Blocks) -> Trace:
    """The trace of all layers from one of `blocks.traced_layers`.

    Raises:
        NotRepeatable: trace the whole model instead.
    """
    return _Extension(trace, _runs(trace, blocks), blocks).build()


def _runs(trace: Trace, blocks: Blocks) -> list[_Run]:
    runs: list[_Run] = []
    seen: set[int] = set()
    sweep = 0
    for event, traced_layer in zip(trace.events, trace.layers, strict=True):
        layer = blocks.block_of(traced_layer)
        if not runs or runs[-1].layer != layer:
            if layer != OUTSIDE:
                if layer in seen:
                    sweep, seen = sweep + 1, set()
                seen.add(layer)
            runs.append(_Run(layer, sweep))
        runs[-1].events.append(event)
    return runs


class _Extension:
    """Builds the longer trace; `_copies[layer]` maps an allocation to its repetition in that layer."""

    def __init__(self, trace: Trace, runs: list[_Run], blocks: Blocks) -> None:
        self._old, self._runs, self._n_layers = trace, runs, blocks.n_blocks
        self._period, self._blocks = blocks.period, blocks
        self._new = Trace()
        self._layer_of: dict[int, int] = {}  # old allocation -> the layer that made it
        self._place: dict[int, tuple[int, int]] = {}  # old allocation -> (sweep, number within its run)
        self._at: dict[tuple[int, int, int], int] = {}  # (sweep, layer, number) -> old allocation
        self._made: dict[tuple[int, int], int] = {}  # (old allocation, new layer) -> new allocation
        self._starts = set(trace.backward_starts)
        self._position = 0  # in the old events, at the start of the current run

    def build(self) -> Trace:
        self._index()
        for run in self._runs:
            for layer in self._layers_of(run):
                self._repeat(run, layer)
            self._position += len(run.events)
        return self._new

    def _index(self) -> None:
        made: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for run in self._runs:
            for event in run.events:
                if event > 0:
                    index = event - 1
                    numbers = made[(run.sweep, run.layer)]
                    self._layer_of[index] = run.layer
                    self._place[index] = (run.sweep, len(numbers))
                    self._at[(run.sweep, run.layer, len(numbers))] = index
                    numbers.append(index)
        self._require_alike(made)

    def _require_alike(self, made: dict[tuple[int, int], list[int]]) -> None:
        """The two middle layers must allocate the same, and every sweep must pass them one after another."""
        sizes = {key: [self._old.allocations[i].n_bytes for i in indices] for key, indices in made.items()}
        for sweep in {run.sweep for run in self._runs}:
            order = [run.layer for run in self._runs if run.sweep == sweep and run.layer != OUTSIDE]
            if order and order not in (sorted(order), sorted(order, reverse=True)):
                raise NotRepeatable
            if sizes.get((sweep, 1)) != sizes.get((sweep, _REPEATED)):
                raise NotRepeatable

    def _layers_of(self, run: _Run) -> Iterable[int]:
        """The new layers in which the run's events happen, in order."""
        if run.layer == _LAST:
            return (self._n_layers - 1,)
        if run.layer != _REPEATED:
            return (run.layer,)
        middle = range(_REPEATED, self._n_layers - 1)
        return reversed(middle) if self._descends(run) else middle

    def _descends(self, run: _Run) -> bool:
        order = [r.layer for r in self._runs if r.sweep == run.sweep and r.layer != OUTSIDE]
        return len(order) > 1 and order[0] > order[-1]

    def _repeat(self, run: _Run, layer: int) -> None:
        for offset, event in enumerate(run.events):
            if self._position + offset in self._starts:
                self._new.backward_starts.append(len(self._new.events))
            if event > 0:
                old = self._old.allocations[event - 1]
                module = _renumbered(old.module, (layer - run.layer) * self._period)
                new = Allocation(self._bytes(old), old.phase, module, old.op, old.component)
                self._made[(event - 1, layer)] = self._new.allocate(new, layer)
            else:
                for index in self._freed(-event - 1, run.layer, layer):
                    self._new.free(index, layer)

    def _bytes(self, old: Allocation) -> int:
        """Larger by the repeated blocks' share, where it is something for all layers at once."""
        if not old.bytes_by_layer:
            return old.n_bytes
        middle = [b for i, b in enumerate(old.bytes_by_layer) if self._blocks.block_of(i) == _REPEATED]
        more = (self._n_layers - _LAST - 1) * sum(middle)
        return old.n_bytes + round_up(more, ALLOC_ROUNDING) if more else old.n_bytes

    def _freed(self, old: int, old_layer: int, layer: int) -> list[int]:
        """The new allocations that go when `old` goes, seen from new layer `layer`."""
        maker = self._layer_of[old]
        if maker == OUTSIDE or old_layer == OUTSIDE:
            return self._all_of(old)
        wanted = layer + (maker - old_layer)
        if (old, wanted) in self._made:
            return self._live(old, wanted)
        sweep, number = self._place[old]
        twin = self._at.get((sweep, _REPEATED, number))
        if twin is None or (twin, wanted) not in self._made:
            raise NotRepeatable
        return self._live(twin, wanted)

    def _all_of(self, old: int) -> list[int]:
        layers = range(-1, self._n_layers)
        return [i for layer in layers if (old, layer) in self._made for i in self._live(old, layer)]

    def _live(self, old: int, layer: int) -> list[int]:
        index = self._made[(old, layer)]
        return [index] if self._new.allocations[index].died is None else []


@cache
def _renumbered(module: str, shift: int) -> str:
    """ "layers.3.mlp" as "layers.27.mlp" """
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is not None and shift:
        parts[at] = str(int(parts[at]) + shift)
    return ".".join(parts)
