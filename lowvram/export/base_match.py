"""Whether an adapter is of this base, told from the base's config alone: no weight is read or downloaded."""

from __future__ import annotations

from collections.abc import Iterator

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.adapter_files import Adapter, ModuleUpdate
from lowvram.export.empty_model import empty_model

_OWN_BASE = "Give the base that the adapter was trained on: --base PATH"


def require_of_base(adapter: Adapter, base: ModelSource) -> None:
    """A hub id whose config is not to be had now is believed, and so is a base with code of its own.

    Raises:
        ConfigError: there is no such folder, or it has other modules or shapes.
    """
    if base.fingerprint is None:
        return
    modules = dict(empty_model(base).named_modules())
    for module, update in adapter.modules.items():
        own = dict(modules[module].named_parameters(recurse=False)) if module in modules else {}
        for parameter, shape in _changed(update):
            name = f"{module}.{parameter}"
            if parameter not in own:
                raise ConfigError(
                    f"The adapter changes '{name}', which the base '{base.name}' does not have.", _OWN_BASE
                )
            found = tuple(own[parameter].shape)
            if shape not in (found, found[::-1]):  # GPT-2 keeps its weights turned
                raise ConfigError(
                    f"'{name}' is {list(found)} in the base and {list(shape)} in the adapter.", _OWN_BASE
                )


def _changed(update: ModuleUpdate) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names of the module's parameters, with the shapes that the adapter takes them to have."""
    if update.a is not None and update.b is not None:
        yield "weight", (update.b.shape[0], update.a.shape[1])
    for parameter, values in update.replaced.items():
        yield parameter, values.shape
