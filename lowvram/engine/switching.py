"""Switching: several adapters on one base that is loaded once; one of them is on, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from lowvram.engine.adapter_folder import AdapterFolder
from lowvram.engine.adapters import with_our_layers
from lowvram.engine.dora import start_magnitudes
from lowvram.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE = "base"  # the name under which no adapter is on
_OWN_BASE = "Give the model that the adapter was trained on: --base PATH"


def add_layers(model: PreTrainedModel, adapters: Sequence[AdapterFolder]) -> Any:
    """LoRA layers for all adapters, without their weights; the model itself where there is no adapter.

    Works on the meta device as well. Inside they have names of our own: peft looks for a name in all names
    of the model, where "layers" would be found.

    Raises:
        ConfigError: an adapter of another model.
    """
    if not adapters:
        return model.requires_grad_(False)
    try:
        made: Any = None
        for index, adapter in enumerate(adapters):
            config = with_our_layers(model, adapter.to_inject())
            if made is None:
                made = get_peft_model(model, config, adapter_name=_inner(index))
            else:
                made.add_adapter(_inner(index), config)
    except (ValueError, TypeError, KeyError) as error:  # peft finds no layer of that name
        raise _other_base(adapter, first_line(error)) from error
    return made.requires_grad_(False)


def require_fitting(peft_model: PeftModel, adapters: Sequence[AdapterFolder]) -> None:
    """Refuse adapters whose tensors are not those that the layers of `add_layers` take.

    Raises:
        ConfigError: names the adapter and the first tensor that is wrong.
    """
    parameters = dict(peft_model.named_parameters())
    for index, adapter in enumerate(adapters):
        state = get_peft_model_state_dict(peft_model, adapter_name=_inner(index), save_embedding_layers=False)
        takes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in adapter.bias_names:
            if (found := _bias_of(name, parameters)) is not None:
                takes[name] = tuple(parameters[found].shape)
        for name in sorted(adapter.shapes.keys() ^ takes.keys()):
            where = "the base has no place for" if name in adapter.shapes else "lacks"
            raise _other_base(adapter, f"{where} {name}")
        for name, shape in adapter.shapes.items():
            if takes[name] != shape:
                raise _other_base(
                    adapter, f"'{name}' is {list(shape)} in it and {list(takes[name])} on this base"
                )


def _bias_of(name: str, parameters: Mapping[str, torch.Tensor]) -> str | None:
    """The base's bias that an adapter's file calls `name`; which layers are wrapped is the others' doing."""
    plain = name.replace(".base_layer.", ".")
    wrapped = f"{plain.removesuffix('bias')}base_layer.bias"
    return next((n for n in (plain, wrapped) if n in parameters), None)


def _other_base(adapter: AdapterFolder, why: str) -> ConfigError:
    return ConfigError(
        f"The adapter '{adapter.folder}' belongs to another model: {why.rstrip('.')}.", _OWN_BASE
    )


def _inner(index: int) -> str:
    return f"lowvram_adapter_{index}"


class Switch:
    """Which adapter is on. Trained biases of the base come and go with their adapter."""

    def __init__(self, model: Any, adapters: Sequence[AdapterFolder]) -> None:
        """The first adapter is on.

        Args:
            model: as `add_layers` made it, on its device; the adapters' weights are loaded here.
        """
        self._model = model
        self._inner = {adapter.name: _inner(index) for index, adapter in enumerate(adapters)}
        self._biases: dict[str, dict[str, torch.Tensor]] = {}  # of each adapter that has some
        if adapters:
            start_magnitudes(model)  # DoRA's, which need the base's norms; what was trained comes next
        for adapter in adapters:
            self._load(adapter)
        self._base_biases = self._kept_biases()
        self.active = BASE
        self.to(next(iter(self._inner), BASE))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters."""
        return tuple(self._inner)

    def to(self, name: str) -> None:
        """Turn one adapter on and the others off; `BASE`: all off.

        Raises:
            ConfigError: no such adapter.
        """
        if name != BASE and name not in self._inner:
            known = ", ".join((BASE, *self._inner))
            raise ConfigError(f"There is no adapter '{name}'.", f"Use one of {known}.")
        self.active = name
        self._set_biases(self._biases.get(name, {}))
        if not self._inner:
            return
        layers = self._model.base_model
        if name == BASE:
            layers.disable_adapter_layers()
            return
        layers.enable_adapter_layers()
        self._model.set_adapter(self._inner[name], inference_mode=True)

    def _load(self, adapter: AdapterFolder) -> None:
        tensors, parameters = adapter.tensors(), dict(self._model.named_parameters())
        own = {str(_bias_of(name, parameters)): tensors.pop(name) for name in adapter.bias_names}
        if own:
            self._biases[adapter.name] = own
        set_peft_model_state_dict(self._model, tensors, adapter_name=self._inner[adapter.name])

    def _kept_biases(self) -> dict[str, torch.Tensor]:
        """Of the base, those that an adapter replaces."""
        parameters = dict(self._model.named_parameters())
        trained = {name for own in self._biases.values() for name in own}
        return {name: parameters[name].detach().clone() for name in trained}

    @torch.no_grad()
    def _set_biases(self, wanted: dict[str, torch.Tensor]) -> None:
        if not self._base_biases:
            return
        parameters = dict(self._model.named_parameters())
        for name, own in self._base_biases.items():
            parameters[name].copy_(wanted.get(name, own))
