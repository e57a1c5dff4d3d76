"""Embedding and head that are one weight in the base: what an adapter makes of them, two or still one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.empty_model import empty_model
from lowvram.export.tensor_changes import Change
from lowvram.export.tensor_files import StoredTensor, name_in_file


def tied_names(base: ModelSource) -> list[set[str]]:
    """Groups of parameter names that are one weight in the model."""
    by_weight: dict[int, set[str]] = {}
    model = empty_model(base)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_weight.setdefault(id(parameter), set()).add(name)
    return [names for names in by_weight.values() if len(names) > 1]


def outside_layers(name: str) -> bool:
    """Whether a tensor's name has no layer's number: only such ones are tied."""
    return not any(part.isdigit() for part in name.split("."))


def settle(
    base: ModelSource, changes: dict[str, Change], stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Decide what becomes of tied weights that `changes` touches; it changes accordingly.

    Returns:
        Name -> base tensor of those that are to be written besides `stored`, since they are tied no longer.

    Raises:
        ConfigError: the model cannot be untied.
    """
    if not any(outside_layers(name) for name in changes):
        return {}
    untied: dict[str, StoredTensor] = {}
    for names in tied_names(base):
        group = _really_tied({name_in_file(name, stored) for name in names}, stored)
        touched = [name for name in sorted(group) if name in changes]
        if not touched:
            continue
        one = next(stored[name] for name in sorted(group, key=_embedding_first) if name in stored)
        if same := _one_for_all(group, touched, changes):
            for name in touched:
                del changes[name]
            changes.update({name: same for name in group if name in stored})
            continue
        _require_pair(base, group, touched)
        untied.update(dict.fromkeys(group, one))
    return untied


def _really_tied(group: set[str], stored: dict[str, StoredTensor]) -> set[str]:
    """Without those that have other values in the file: FLAN-T5's head, which transformers takes as it is."""
    here = [stored[name] for name in sorted(group, key=_embedding_first) if name in stored]
    return {name for name in group if here and (name not in stored or _same_values(here[0], stored[name]))}


def _embedding_first(name: str) -> tuple[bool, str]:
    return "head" in name, name


def _one_for_all(group: set[str], touched: list[str], changes: dict[str, Change]) -> Change | None:
    """The change that all names of the group share, so that they stay one weight."""
    first = changes[touched[0]]
    if len(touched) == 1 and first.only_token_rows:  # peft's wrapper of the head follows the embedding's
        return first
    plain = all(replace(changes[name], replaced=None) == Change() for name in touched)
    if len(touched) == len(group) and plain and all(_equal(first, changes[name]) for name in touched):
        return first
    return None


def _equal(one: Change, other: Change) -> bool:
    a, b = one.replaced, other.replaced
    return a is not None and b is not None and _same_values(a, b)


def _same_values(a: StoredTensor, b: StoredTensor) -> bool:
    if a is b or a.shape != b.shape:
        return a is b
    return all(torch.equal(a.rows(*span), b.rows(*span)) for span in a.spans())


def _require_pair(base: ModelSource, group: set[str], touched: list[str]) -> None:
    config: Any = base.config
    if len(group) == 2 and not config.is_encoder_decoder:
        return
    raise ConfigError(
        f"The adapter changes '{touched[0]}', which in a model of type '{config.model_type}' is one weight "
        f"with {len(group) - 1} others.",
        "Keep using it with peft, unmerged; this model cannot have two of them.",
    )
