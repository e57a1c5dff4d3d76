"""Extends the trace of a few layers to all of them, event by event.

Four blocks are traced: the first, two in the middle and the last; a block is one layer, or one period where
layers alternate (Gemma). What happens in the third happens again in every further middle block, with tensors
of its own. So its events are repeated once for each; a tensor that a neighbour made is replaced by the one
that the neighbour's repetition made. Where the last layers keep their activations and the others do not, four
of each kind are traced, and the two stretches of like blocks are extended one after the other. The result is
replayed through the allocator like a trace of the whole model, and is equal to it byte by byte, at a fraction
of its time.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from lowvram.memory.trace import ALLOC_ROUNDING, CACHE_EMPTIED, OUTSIDE, Allocation, Trace, round_up

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TRACED = 4  # blocks of a stretch of like ones: from its start on the first, two of the middle and the last
# Settings that make single layers different without a list that says which.
_IRREGULAR = ("first_k_dense_replace", "mlp_only_layers", "full_attn_idxs", "cross_attention_layers")


class NotRepeatable(Exception):  # noqa: N818  # not an error: the caller traces the whole model instead
    """The layers do not run one after another, or differ in what they allocate."""


@dataclass(frozen=True)
class Stretch:
    """Like blocks in a row, from block `start` on; four of them were traced."""

    start: int
    n_blocks: int
    period: int
    left_over: int  # layers of the model's first block, beside a period

    @property
    def n_more(self) -> int:
        """Repetitions that were not traced."""
        return self.n_blocks - _TRACED

    @property
    def repeated(self) -> int:
        """The block whose events are repeated."""
        return self.start + 2

    def block_of(self, layer: int) -> int:
        return OUTSIDE if layer == OUTSIDE else max(layer - self.left_over, 0) // self.period

    def new_block(self, block: int) -> int:
        """A traced block's number among all."""
        return block + self.n_more if block > self.repeated else block

    def contains(self, block: int) -> bool:
        """Whether a traced block is of the stretch."""
        return self.start <= block < self.start + _TRACED


@dataclass(frozen=True)
class Blocks:
    """How a model's layers repeat: blocks of `period` layers, the first one with what is left over."""

    n_layers: int
    period: int
    kept_layers: int = 0  # at the end, which allocate in their own way

    @property
    def traced_layers(self) -> int:
        return self.n_layers % self.period + self.period * sum(min(n, _TRACED) for n in self._n_blocks)

    @property
    def traced_kept_layers(self) -> int:
        return self.period * min(self._n_blocks[1], _TRACED)

    @property
    def _n_blocks(self) -> tuple[int, int]:
        kept = self.kept_layers // self.period
        return self.n_layers // self.period - kept, kept

    def stretches(self) -> Iterator[Stretch]:
        """Those with blocks that were not traced, in the order in which they are extended."""
        start = 0
        for n_blocks in self._n_blocks:
            if n_blocks > _TRACED:
                yield Stretch(start, n_blocks, self.period, self.n_layers % self.period)
            start += n_blocks


def blocks_of(config: PretrainedConfig, kept_layers: int = 0) -> Blocks | None:
    """How the layers of this model repeat; None when they do not, or are too few to save anything."""
    n_layers, period = int(config.get_text_config().num_hidden_layers), period_of(config)
    if period is None or kept_layers % period or kept_layers >= n_layers:
        return None
    blocks = Blocks(n_layers, period, kept_layers)
    return blocks if blocks.traced_layers < n_layers else None


def period_of(config: PretrainedConfig) -> int | None:
    """After how many layers of this model they repeat, if they do."""
    text = config.get_text_config()
    if config.is_encoder_decoder or any(getattr(text, name, None) for name in _IRREGULAR):
        return None
    n_layers = int(text.num_hidden_layers)
    lists = [v for v in vars(text).values() if _is_per_layer(v, n_layers)]
    steps = max(int(getattr(text, "decoder_sparse_step", 1) or 1), 1)
    periods = (p for p in range(steps, n_layers) if p % steps == 0)
    return next((p for p in periods if all(_repeats(v, p) for v in lists)), None)


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


def trace_repeating(
    config: PretrainedConfig, trace: Callable[[PretrainedConfig, int], Trace], kept_layers: int = 0
) -> Trace:
    """The whole model's trace: extended from a few layers where they repeat, else of every layer.

    Args:
        trace: of a config whose last so many layers keep their activations.
    """
    blocks = blocks_of(config, kept_layers)
    if blocks is not None:
        with suppress(NotRepeatable):
            short = with_layers(config, blocks.traced_layers)
            return extend(trace(short, blocks.traced_kept_layers), blocks)
    return trace(config, kept_layers)


@dataclass
class _Run:
    """Consecutive events of one block."""

    block: int
    sweep: int  # which sweep over the layers: loading, forward, backward, ...
    events: list[int] = field(default_factory=list)


def extend(trace: Trace, blocks: Blocks) -> Trace:
    """The trace of all layers from one of `blocks.traced_layers`.

    Raises:
        NotRepeatable: trace the whole model instead.
    """
    for stretch in blocks.stretches():
        trace = _Extension(trace, _runs(trace, stretch), stretch).build()
    return trace


def _runs(trace: Trace, stretch: Stretch) -> list[_Run]:
    runs: list[_Run] = []
    seen: set[int] = set()
    sweep = 0
    for event, layer in zip(trace.events, trace.layers, strict=True):
        block = stretch.block_of(layer)
        if not runs or runs[-1].block != block:
            if block != OUTSIDE:
                if block in seen:
                    sweep, seen = sweep + 1, set()
                seen.add(block)
            runs.append(_Run(block, sweep))
        runs[-1].events.append(event)
    return runs


class _Extension:
    """Builds the longer trace of one stretch."""

    def __init__(self, trace: Trace, runs: list[_Run], stretch: Stretch) -> None:
        self._old, self._runs, self._stretch = trace, runs, stretch
        self._new = Trace()
        self._block_of: dict[int, int] = {}  # old allocation -> the block that made it
        self._place: dict[int, tuple[int, int]] = {}  # old allocation -> (sweep, number within its run)
        self._at: dict[tuple[int, int, int], int] = {}  # (sweep, block, number) -> old allocation
        self._made: defaultdict[int, dict[int, int]] = defaultdict(dict)  # old -> {new block: new allocation}
        self._starts = set(trace.backward_starts)
        self._position = 0  # in the old events, at the start of the current run

    def build(self) -> Trace:
        self._index()
        for run in self._runs:
            for block in self._blocks_of(run):
                self._repeat(run, block)
            self._position += len(run.events)
        return self._new

    def _index(self) -> None:
        made: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for run in self._runs:
            for event in run.events:
                if event > 0:
                    index = event - 1
                    numbers = made[(run.sweep, run.block)]
                    self._block_of[index] = run.block
                    self._place[index] = (run.sweep, len(numbers))
                    self._at[(run.sweep, run.block, len(numbers))] = index
                    numbers.append(index)
        self._require_alike(made)

    def _require_alike(self, made: dict[tuple[int, int], list[int]]) -> None:
        """The two middle blocks must allocate the same, and every sweep must pass all one after another."""
        sizes = {key: [self._old.allocations[i].n_bytes for i in indices] for key, indices in made.items()}
        middle = self._stretch.repeated
        for sweep in {run.sweep for run in self._runs}:
            order = [run.block for run in self._runs if run.sweep == sweep and run.block != OUTSIDE]
            if order and order not in (sorted(order), sorted(order, reverse=True)):
                raise NotRepeatable
            if sizes.get((sweep, middle - 1)) != sizes.get((sweep, middle)):
                raise NotRepeatable

    def _blocks_of(self, run: _Run) -> Iterable[int]:
        """The new blocks in which the run's events happen, in order."""
        if run.block != self._stretch.repeated:
            return (self._stretch.new_block(run.block),)
        middle = range(run.block, run.block + self._stretch.n_more + 1)
        return reversed(middle) if self._descends(run) else middle

    def _descends(self, run: _Run) -> bool:
        order = [r.block for r in self._runs if r.sweep == run.sweep and r.block != OUTSIDE]
        return len(order) > 1 and order[0] > order[-1]

    def _repeat(self, run: _Run, block: int) -> None:
        shift = (block - run.block) * self._stretch.period  # layers
        for at, event in enumerate(run.events, self._position):
            if at in self._starts:
                self._new.backward_starts.append(len(self._new.events))
            layer = self._old.layers[at] + shift
            if event == CACHE_EMPTIED:
                self._new.empty_cache()
            elif event > 0:
                copied = self._copy(self._old.allocations[event - 1], shift)
                self._made[event - 1][block] = self._new.allocate(copied, layer)
            else:
                for index in self._freed(-event - 1, run.block, block):
                    self._new.free(index, layer)

    def _copy(self, old: Allocation, shift: int) -> Allocation:
        """Larger by the repeated blocks' share, where it is something for all layers at once."""
        n_bytes, shares, stretch = old.n_bytes, old.bytes_by_layer, self._stretch
        if shares:
            start = stretch.left_over + stretch.repeated * stretch.period
            more = shares[start : start + stretch.period] * stretch.n_more
            n_bytes += round_up(sum(more), ALLOC_ROUNDING)
            shares = (*shares[:start], *more, *shares[start:])
        module = _renumbered(old.module, shift)
        return Allocation(n_bytes, old.phase, module, old.op, old.component, bytes_by_layer=shares)

    def _freed(self, old: int, old_block: int, block: int) -> list[int]:
        """The new allocations that go when `old` goes, seen from new block `block`."""
        maker = self._block_of[old]
        if maker == OUTSIDE or old_block == OUTSIDE:
            return [index for made in sorted(self._made[old]) for index in self._live(old, made)]
        wanted = block + (maker - old_block)
        if wanted in self._made[old]:
            return self._live(old, wanted)
        if not (self._stretch.contains(maker) and self._stretch.contains(old_block)):
            return self._live(old, self._stretch.new_block(maker))
        sweep, number = self._place[old]
        twin = self._at.get((sweep, self._stretch.repeated, number))
        if twin is None or wanted not in self._made[twin]:
            raise NotRepeatable
        return self._live(twin, wanted)

    def _live(self, old: int, block: int) -> list[int]:
        """The new allocation, while it lives."""
        index = self._made[old].get(block)
        if index is None:
            raise NotRepeatable
        return [index] if self._new.allocations[index].died is None else []


@cache
def _renumbered(module: str, shift: int) -> str:
    """ "layers.3.mlp" as "layers.27.mlp" """
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is not None and shift:
        parts[at] = str(int(parts[at]) + shift)
    return ".".join(parts)
