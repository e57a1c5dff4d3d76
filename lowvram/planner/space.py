"""Space: all candidates of a search, and which of two takes less memory for certain."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowvram.engine.config import StepConfig
from lowvram.engine.shape import ModelShape
from lowvram.planner.arithmetic import logit_bytes, saved_by_head
from lowvram.planner.initialisation import allows
from lowvram.planner.levers import LEVERS, Setting, Values, compute_dtype
from lowvram.planner.variants import split, value_of, with_kept, with_value

ALL = "all"  # layers keep their activations: nothing is recomputed
_KEEPING = ("gradient_checkpointing", "kept_layers")
_RECOMPUTING = ("kept_layers", "tile_tokens", "offload_checkpoints")
_TILED_HEAD_CHUNK = 2048
_PLACED = ("head", "embedding_on_host")  # their 16-bit weights are on the device while loading


@dataclass(frozen=True)
class Candidate:
    """A step, but for how many of its layers keep their activations."""

    step: StepConfig  # with as few kept layers as may be
    kept: Values  # choices of kept layers, ascending: each takes more memory than the one before
    place: tuple[int, ...]  # along each lever, in the ladder's order: a larger number takes less memory
    apart: tuple[Any, ...]  # where these differ, neither takes less memory for certain

    def at(self, index: int) -> StepConfig:
        """The step with that choice of kept layers."""
        kept = self.kept[index]
        if kept == ALL:
            return with_value(self.step, "gradient_checkpointing", False)
        return with_kept(self.step, kept)

    def is_leaner(self, other: Candidate) -> bool:
        """Takes no more memory than `other` with as many kept layers."""
        return self.apart == other.apart and all(a >= b for a, b in zip(self.place, other.place, strict=True))

    def loads_like(self, other: Candidate) -> bool:
        """The same is on the device while loading, where a quantised head is beside its 16-bit weight."""
        return all(value_of(self.step, name) == value_of(other.step, name) for name in _PLACED)


def candidates(
    setting: Setting, pinned: Mapping[str, Any], ladder: tuple[str, ...], packing: bool
) -> list[Candidate]:
    """Every combination of settings that the engine, the model, the device and the user allow.

    Args:
        pinned: what the user fixed: levers, and fields of the step.
        ladder: levers that the planner may move, in the order in which it likes to.
        packing: examples are packed where the sequence is not tiled.
    """
    choices = _choices(setting, _implied(pinned), ladder)
    axes = {name: values for name, values in choices.items() if name not in _KEEPING}
    kept = _kept(choices, pinned)
    found = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        some = tuple(k for k in kept if k == 0) if _tiles(chosen) else kept
        if some and _go_together(setting, chosen, axes):
            chosen = _in_larger_chunks(chosen, axes)
            step = _step(setting, chosen, some[0], packing and not _tiles(chosen))
            place = tuple(_place(setting.shape, name, chosen, axes[name]) for name in axes)
            found.append(Candidate(step, some, place, (step.accumulation == 1, step.packing)))
    return found


def _implied(pinned: Mapping[str, Any]) -> dict[str, Any]:
    """Tiles and kept layers ask for recomputing; who asks for recomputing itself wants no exceptions."""
    recomputes = any(pinned.get(name) for name in _RECOMPUTING)
    all_layers = {"kept_layers": 0} if pinned.get("gradient_checkpointing") else {}
    return all_layers | ({"gradient_checkpointing": True} if recomputes else {}) | dict(pinned)


def _choices(setting: Setting, pinned: Mapping[str, Any], ladder: tuple[str, ...]) -> dict[str, Values]:
    """Lever -> its settings here, in the ladder's order."""

    def of(name: str, values: Values, unused: Any) -> Values:
        if name in pinned:
            return (pinned[name],)
        return values if name in ladder else (unused,)

    ordered = sorted(LEVERS, key=lambda x: ladder.index(x.name) if x.name in ladder else len(ladder))
    return {x.name: of(x.name, x.settings(setting), x.unused(setting)) for x in ordered}


def _kept(choices: Mapping[str, Values], pinned: Mapping[str, Any]) -> Values:
    """Ascending: all recomputed, some kept, all kept."""
    may = choices["gradient_checkpointing"]
    some = tuple(reversed(choices["kept_layers"])) if True in may else ()
    return (*some, ALL) if False in may and not pinned.get("kept_layers") else some


def _tiles(chosen: Mapping[str, Any]) -> bool:
    return bool(chosen["tile_tokens"] or chosen["offload_checkpoints"])


def _go_together(setting: Setting, chosen: Mapping[str, Any], axes: Mapping[str, Values]) -> bool:
    """Leaves out what the engine refuses, and what only repeats another candidate."""
    if chosen["base_precision"] != "nf4" and chosen["double_quantization"] != axes["double_quantization"][-1]:
        return False
    if not allows(setting.base, chosen["base_precision"], _tiles(chosen)):
        return False
    if chosen["packing"] and _tiles(chosen):
        return False  # packing that was asked for is not given up for tiles
    whole_head = chosen["head"] == "16bit"
    free = len(axes["head"]) * len(axes["embedding_on_host"]) > 1
    if setting.shape.tied and free and chosen["embedding_on_host"] == whole_head:
        return False  # one weight: a placed head alone saves nothing
    if not whole_head and chosen["loss_chunk_tokens"] != axes["loss_chunk_tokens"][0]:
        return False
    return not chosen["tile_tokens"] or chosen["micro_batch"] == axes["micro_batch"][-1]


def _in_larger_chunks(chosen: dict[str, Any], axes: Mapping[str, Values]) -> dict[str, Any]:
    """A tiled head is read anew for each chunk: it has few, which are small, a tile of the words each."""
    free = chosen["head"] != "16bit" and len(axes["loss_chunk_tokens"]) > 1
    return chosen | {"loss_chunk_tokens": _TILED_HEAD_CHUNK} if free else chosen


def _place(shape: ModelShape, name: str, chosen: Mapping[str, Any], values: Values) -> int:
    """Along one lever.

    Of a tiled head only a tile of logits exists: they are as small as a whole head in the smallest chunks, as
    far as the head itself saves what its chunk takes more.
    """
    head = chosen["head"]
    if name != "loss_chunk_tokens" or head == "16bit":
        return values.index(chosen[name])
    own = logit_bytes(chosen[name], shape, head) - saved_by_head(shape, head)
    smaller = [i for i, chunk in enumerate(values) if logit_bytes(chunk, shape, "16bit") >= own]
    return max(smaller, default=0)


def _step(setting: Setting, chosen: Mapping[str, Any], kept: Any, packing: bool) -> StepConfig:
    base = setting.base
    levers = {name: value for name, value in chosen.items() if hasattr(base.levers, name)}
    levers |= {"gradient_checkpointing": kept != ALL, "kept_layers": 0 if kept == ALL else kept}
    precision = chosen["base_precision"]
    changes = {
        "base_precision": precision,
        "compute_dtype": compute_dtype(precision, setting.hardware),
        "optimizer": chosen["optimizer"],
        "packing": packing,
        "levers": base.levers.model_copy(update=levers),
    }
    return split(base.model_copy(update=changes), chosen["micro_batch"])
