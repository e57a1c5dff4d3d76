"""A model whose weights come from files for the moment in which a module runs: a 7B on an 8 GB card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.empty_model import empty_model
from lowvram.export.tensor_files import StoredTensor, name_in_file, tensors_of_folder

Read = Callable[[str, StoredTensor], torch.Tensor]  # name in the file, the tensor there -> its values


def as_stored(_name: str, stored: StoredTensor) -> torch.Tensor:
    return stored.whole()


@dataclass
class Ticks:
    """Counts the modules that have run, of all that will."""

    say: Callable[[int, int], None] = lambda _done, _total: None
    done: int = 0
    total: int = 0

    def tick(self) -> None:
        self.done += 1
        self.say(self.done, self.total)


def streamed_model(
    source: ModelSource,
    device: torch.device,
    adapter: Path | None = None,
    read: Read = as_stored,
    ticks: Ticks | None = None,
) -> Any:
    """The model of a folder in float32, wrapped by plain peft if there is an adapter, unmerged.

    Of the base only one module's weights are in memory at a time; the adapter's own stay on `device`.

    Args:
        read: how the base's tensors look, where not as they are stored.

    Raises:
        ConfigError: transformers makes this model's weights of others than the files hold.
    """
    model = empty_model(source)
    stored = tensors_of_folder(Path(source.name))
    places = _placeholders(model, source, stored)
    _fill_buffers(model, stored)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    _move_own(model, places, device)
    covered: set[int] = set()
    for module in model.modules():
        if slots := _slots(module, places, covered):
            station = _Station(
                slots,
                lambda name: read(name, stored[name]).to(device, torch.float32),
                ticks or Ticks(),
            )
            module.register_forward_pre_hook(station.fill)
            module.register_forward_hook(station.empty, always_call=True)
    return model


def _placeholders(model: Any, source: ModelSource, stored: dict[str, StoredTensor]) -> dict[int, str]:
    """Give each parameter its shape on the CPU without memory, one number seen everywhere.

    On the meta device peft would put the adapter there as well.

    Returns:
        id of a placeholder -> name of its tensor in the files. The model keeps the placeholders alive.
    """
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name_in_file(name, stored))
    places: dict[int, str] = {}
    made: dict[tuple[int, str], nn.Parameter] = {}
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = name_in_file(f"{prefix}.{name}" if prefix else name, stored)
            place = own if own in stored else next((n for n in tied[id(parameter)] if n in stored), own)
            _require_stored(source, stored, place, parameter)
            key = id(parameter), place  # a tied weight stays one, unless the file holds two
            if key not in made:
                made[key] = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
                places[id(made[key])] = place
            setattr(module, name, made[key])
    return places


def _require_stored(
    source: ModelSource, stored: dict[str, StoredTensor], name: str, parameter: torch.Tensor
) -> None:
    if name in stored and stored[name].shape == tuple(parameter.shape):
        return
    raise ConfigError(
        f"'{source.name}' holds no '{name}' of shape {list(parameter.shape)}: transformers makes the weights "
        f"of a '{source.config.model_type}' of others, so they cannot be verified one by one.",
        "Merge with --no-verify.",
    )


def _fill_buffers(model: Any, stored: dict[str, StoredTensor]) -> None:
    for name, buffer in model.named_buffers():
        file_name = name_in_file(name, stored)
        if file_name in stored:
            buffer.copy_(stored[file_name].whole())


def _move_own(model: nn.Module, places: dict[int, str], device: torch.device) -> None:
    """The adapter's parameters and all buffers; moving a placeholder would give it memory."""
    for parameter in model.parameters():
        if id(parameter) not in places:
            parameter.data = parameter.data.to(device, torch.float32)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


_Slot = tuple[nn.Module, str, nn.Parameter, str]  # module, parameter, placeholder, name in the file


def _slots(module: nn.Module, places: dict[int, str], covered: set[int]) -> list[_Slot]:
    """A module's own parameters that lie in files.

    peft's layers use their base layer's weight themselves (DoRA's norm, replaced tokens), so such a layer
    answers for all that is in it.
    """
    if id(module) in covered:
        return []
    slots: list[_Slot] = []
    for part in module.modules() if isinstance(module, BaseTunerLayer) else [module]:
        covered.add(id(part))
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) in places:
                slots.append((part, name, parameter, places[id(parameter)]))
    return slots


class _Station:
    """Fetches a module's weights before it runs and lets them go after."""

    def __init__(self, slots: list[_Slot], fetch: Callable[[str], torch.Tensor], ticks: Ticks) -> None:
        self._slots, self._fetch, self._ticks = slots, fetch, ticks
        self._counted = False
        ticks.total += 1

    def fill(self, *_: object) -> None:
        for part, name, _placeholder, file_name in self._slots:
            setattr(part, name, nn.Parameter(self._fetch(file_name), requires_grad=False))
        if not self._counted:  # a head runs once for each chunk
            self._counted = True
            self._ticks.tick()

    def empty(self, *_: object) -> None:
        for part, name, placeholder, _file_name in self._slots:
            setattr(part, name, placeholder)
