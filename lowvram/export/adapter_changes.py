"""An adapter's modules as changes of the base's tensors, refused where the two do not belong together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.adapter_files import Adapter, ModuleUpdate
from lowvram.export.tensor_changes import Change, LowRank
from lowvram.export.tensor_files import StoredTensor, name_in_file
from lowvram.export.tied_weights import settle

MERGEABLE = (torch.bfloat16, torch.float16, torch.float32)
_OWN_BASE = "Give the base that the adapter was trained on: --base PATH"
_TURNED_MODELS = ("gpt2", "openai-gpt", "imagegpt")  # of transformers' Conv1D, whose weight is [in, out]


def changes_of(
    source: ModelSource, adapter: Adapter, stored: dict[str, StoredTensor]
) -> tuple[dict[str, Change], dict[str, StoredTensor]]:
    """Tensor name -> change, and the base tensors of names that are to be written besides `stored`.

    Raises:
        ConfigError: names or shapes differ, or a tensor is none that can be changed.
    """
    turned = bool(adapter.config.get("fan_in_fan_out")) or source.config.model_type in _TURNED_MODELS
    changes: dict[str, Change] = {}
    for module, update in adapter.modules.items():
        changes.update(_changes(module, update, stored, turned))
    untied = settle(source, changes, stored)
    _require_match(source, changes, stored | untied)
    return changes, untied


def _changes(
    module: str, update: ModuleUpdate, stored: dict[str, StoredTensor], turned: bool
) -> dict[str, Change]:
    """Tensor name -> change, of one module."""
    weight, bias = (name_in_file(f"{module}.{kind}", stored) for kind in ("weight", "bias"))
    made = {
        name_in_file(f"{module}.{parameter}", stored): Change(replaced=values)
        for parameter, values in update.replaced.items()
    }
    low_rank = None
    if update.a is not None and update.b is not None:
        shape = stored[weight].shape if weight in stored else None
        low_rank = _low_rank(update, shape, turned)
    if low_rank or update.token_rows:
        made[weight] = Change(
            replaced=update.replaced.get("weight"),
            low_rank=low_rank,
            token_rows=update.token_rows,
            token_ids=update.token_ids,
        )
    if update.lora_bias is not None:
        made[bias] = Change(update.replaced.get("bias"), added=update.lora_bias, scaling=update.scaling)
    return made


def _low_rank(update: ModuleUpdate, shape: tuple[int, ...] | None, turned: bool) -> LowRank:
    """peft's own rule: Conv1D layers are turned, linear layers are not, whatever the config says."""
    assert update.a is not None
    assert update.b is not None
    lies = LowRank(update.a, update.b, update.scaling, True, update.magnitude)
    if update.is_embedding or (turned and shape in (None, lies.shape)):
        return lies
    return LowRank(update.a, update.b, update.scaling, False, update.magnitude)


def _require_match(source: ModelSource, changes: dict[str, Change], stored: dict[str, StoredTensor]) -> None:
    """Refuse a change of what is not there, is of another shape, or is made by transformers when it loads."""
    converters = _converters(source.config)
    for name, change in changes.items():
        if name not in stored:
            why = _why_absent(name, converters)
            raise ConfigError(
                f"The adapter changes '{name}', which the base does not have: {why}.", _OWN_BASE
            )
        if made := _made_by(converters, name):
            raise ConfigError(
                f"The adapter changes '{name}', which transformers makes of other tensors when it loads a "
                f"'{source.config.model_type}' ({made}).",
                "Keep using it with peft, unmerged.",
            )
        _require_same(name, change, stored[name])


def _require_same(name: str, change: Change, base: StoredTensor) -> None:
    if base.dtype not in MERGEABLE:
        raise ConfigError(
            f"'{name}' is stored as {str(base.dtype).removeprefix('torch.')}, not in 16 or 32 bits.",
            "Merge onto the 16-bit original of this base: --base PATH",
        )
    for shape in _shapes(change, base.shape):
        if shape != base.shape:
            raise ConfigError(
                f"'{name}' is {list(base.shape)} in the base and {list(shape)} in the adapter.", _OWN_BASE
            )


def _shapes(change: Change, base: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The base's shape as each part of the change has it."""
    if change.replaced is not None:
        yield change.replaced.shape
    if change.low_rank is not None:
        yield change.low_rank.shape
        if change.low_rank.magnitude is not None:
            out = change.low_rank.b.shape[0]
            yield base if change.low_rank.magnitude.shape == (out,) else change.low_rank.magnitude.shape
    if change.added is not None:
        yield change.added.shape
    if change.token_rows is not None:
        inside = all(0 <= token < base[0] for token in change.token_ids)
        yield (base[0] if inside else 1 + max(change.token_ids), *change.token_rows.shape[1:])


def _why_absent(name: str, converters: list[Any]) -> str:
    if name.endswith(".bias"):
        return "its layer has no bias there, and plain transformers would not load one"
    if any(hasattr(entry, "operations") for entry in converters):
        return "it belongs to another model, or transformers has it under another name in memory than on disk"
    return "it belongs to another model"


def _converters(config: Any) -> list[Any]:
    """How transformers renames or fuses this kind of model's tensors when it loads them."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return list(get_checkpoint_conversion_mapping(config.model_type) or [])


def _made_by(converters: list[Any], name: str) -> str:
    """The operation that makes this tensor of others; "" where it is taken as it is stored."""
    for entry in converters:
        targets = [entry.target_patterns] if isinstance(entry.target_patterns, str) else entry.target_patterns
        if hasattr(entry, "operations") and any(re.search(_open(target), name) for target in targets):
            return ", ".join(type(operation).__name__ for operation in entry.operations)
    return ""


def _open(target: str) -> str:
    """A pattern of what a conversion writes, whose back references may be anything."""
    return re.sub(r"\\\d", ".*", target)
