"""Known models: the shipped table of popular models, for plans while the hub cannot be asked."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TABLE = Path(__file__).with_name("known_models.yaml")
_STORED_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_ALIKE = 0.6  # below it a suggestion is no longer the model that was meant


@dataclass(frozen=True)
class KnownModel:
    """One hub id of the table."""

    name: str
    parameters: int
    weights_bytes: int
    gated: bool
    facts: dict[str, Any]

    def config(self) -> PretrainedConfig:
        """What its config.json would give, as far as it decides shapes and memory."""
        from transformers import AutoConfig

        facts = copy.deepcopy(self.facts)  # config classes change nested facts, and YAML anchors share them
        config: PretrainedConfig = AutoConfig.for_model(facts.pop("model_type"), **facts)
        return config


def known_model(name: str) -> KnownModel | None:
    """The table's row for a hub id, in any case of letters."""
    return _by_id().get(name.casefold())


def known_config(name: str) -> PretrainedConfig | None:
    """The config of a model that the table has, built anew."""
    known = known_model(name)
    return known.config() if known else None


def nearest_known(name: str) -> str | None:
    """The hub id that was probably meant by a name the table lacks; None when none resembles it."""
    best = max(_by_id().values(), key=lambda known: _likeness(name, known.name))
    return best.name if _likeness(name, best.name) >= _ALIKE else None


def table() -> list[dict[str, Any]]:
    """The entries as they are in the file; each stands for one set of shapes."""
    entries: list[dict[str, Any]] = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return entries


@cache
def _by_id() -> dict[str, KnownModel]:
    return {known.name.casefold(): known for entry in table() for known in _rows(entry)}


def _rows(entry: dict[str, Any]) -> Iterator[KnownModel]:
    """The entry's own id and its other ones, each with what differs."""
    for name, differs in {entry["name"]: None, **entry.get("also", {})}.items():
        row = entry | (differs or {})
        own_bytes = row["parameters"] * _STORED_BYTES[row["stored"]]
        same_owner = name.split("/")[0] == entry["name"].split("/")[0]
        yield KnownModel(
            name=name,
            parameters=row["parameters"],
            weights_bytes=row.get("weights_bytes", own_bytes),
            gated=row.get("gated", False) and same_owner,
            facts=entry["config"] | row["config"],
        )


def _likeness(wanted: str, known: str) -> float:
    """0 to 1. The model's own name counts most: the owner is often guessed, or left out."""
    wanted, known = wanted.casefold(), known.casefold()
    model = _ratio(wanted.rsplit("/", 1)[-1], known.rsplit("/", 1)[-1])
    return model if "/" not in wanted else 0.75 * model + 0.25 * _ratio(wanted, known)


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()
