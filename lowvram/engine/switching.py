"""Switching: several adapters on one base that is loaded once; one of them is on, or none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from lowvram.engine.adapter_folder import AdapterFolder
from lowvram.engine.adapter_names import wrong_rank
from lowvram.engine.adapters import with_our_layers
from lowvram.engine.dora import start_magnitudes
from lowvram.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."  # of every name in an adapter's file
_ROWS_AT_ONCE = 4096
BASE = "base"  # the name under which no adapter is on
_Own = dict[torch.nn.Parameter, torch.Tensor]  # the base's own -> what it is while an adapter is on
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
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Model has `tie_word")  # of training and merging
                if made is None:
                    made = get_peft_model(model, config, adapter_name=_inner(index))
                else:
                    made.add_adapter(_inner(index), config)
    except (ValueError, TypeError, KeyError) as error:  # peft finds no layer of that name
        if adapter.on_vocabulary and any(a.on_vocabulary for a in adapters[:index]):
            raise _not_beside(adapter, first_line(error)) from error
        raise _other_base(adapter, first_line(error)) from error
    return made.requires_grad_(False)


def require_fitting(peft_model: PeftModel, adapters: Sequence[AdapterFolder]) -> None:
    """Refuse adapters whose tensors are not those that the layers of `add_layers` take.

    Raises:
        ConfigError: names the adapter and the first tensor that is wrong.
    """
    parameters = _parameters(peft_model)
    for index, adapter in enumerate(adapters):
        takes = _taken_by_layers(peft_model, index)
        _require_ranks(adapter, takes)
        for name, found in _of_base(adapter, takes, parameters).items():
            takes[name] = tuple(parameters[found].shape)
        for name in sorted(adapter.shapes.keys() ^ takes.keys()):
            where = "the base has no place for" if name in adapter.shapes else "lacks"
            raise _other_base(adapter, f"{where} {name}")
        for name, shape in adapter.shapes.items():
            if takes[name] != shape:
                raise _other_base(
                    adapter, f"'{name}' is {list(shape)} in it and {list(takes[name])} on this base"
                )


def _parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """All names: a tied head's weight has the embedding's beside its own, and a file may use either."""
    return dict(model.named_parameters(remove_duplicate=False))


def _taken_by_layers(peft_model: PeftModel, index: int) -> dict[str, tuple[int, ...]]:
    """Name in the file -> shape, of all that belongs to the adapter's own layers."""
    state = get_peft_model_state_dict(peft_model, adapter_name=_inner(index), save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _require_ranks(adapter: AdapterFolder, takes: Mapping[str, tuple[int, ...]]) -> None:
    """Before any shape: another rank makes no other model."""
    shapes = adapter.shapes
    for name in sorted(shapes.keys() & takes.keys()):
        module, is_a, ending = name.partition(".lora_embedding_A")
        if not is_a:
            module, is_a, ending = name.partition(".lora_A")
        b = f"{module}{is_a[:-1]}B{ending}"
        if not is_a or not len(shapes[name]) == len(shapes.get(b, ())) == 2:
            continue
        rank, found = takes[name][0], (shapes[name][0], shapes[b][1])
        if found != (rank, rank):
            raise wrong_rank(adapter.folder, module.removeprefix(_PREFIX), rank, found)


def _of_base(
    adapter: AdapterFolder, takes: Mapping[str, object], parameters: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Name in the file -> the base's own parameter that it replaces while the adapter is on.

    Those are trained biases, and the embedding that peft saves with an adapter on it. Which layers are
    wrapped is the other adapters' doing.
    """
    found = {}
    for name in adapter.shapes.keys() - takes.keys():
        module, _, kind = name.replace(".base_layer.", ".").rpartition(".")
        places = (f"{module}.{between}{kind}" for between in ("", "base_layer.", "original_module."))
        if "lora_" not in name and (place := next((p for p in places if p in parameters), None)):
            found[name] = place
    return found


def _same_values(parameter: torch.Tensor, other: torch.Tensor) -> bool:
    """In the parameter's dtype; 4,096 rows at one time, for an embedding may be a GB."""
    pairs = zip(
        torch.split(parameter.detach(), _ROWS_AT_ONCE), torch.split(other, _ROWS_AT_ONCE), strict=True
    )
    return all(torch.equal(own.cpu(), rows.to(own.dtype)) for own, rows in pairs)


def _other_base(adapter: AdapterFolder, why: str) -> ConfigError:
    return ConfigError(
        f"The adapter '{adapter.folder}' belongs to another model: {why.rstrip('.')}.", _OWN_BASE
    )


def _not_beside(adapter: AdapterFolder, why: str) -> ConfigError:
    """peft has one kind of wrapper a layer: LoRA on a head, or a head that an adapter brings whole."""
    return ConfigError(
        f"The adapter '{adapter.folder}' cannot be on one base with those before it: {why.rstrip('.')}.",
        "Leave one of them out.",
    )


def _inner(index: int) -> str:
    return f"lowvram_adapter_{index}"


class Switch:
    """Which adapter is on. What it has of the base's own, trained biases, comes and goes with it."""

    def __init__(self, model: Any, adapters: Sequence[AdapterFolder]) -> None:
        """The first adapter is on.

        Args:
            model: as `add_layers` made it, on its device; the adapters' weights are loaded here.
        """
        self._model = model
        self._inner = {adapter.name: _inner(index) for index, adapter in enumerate(adapters)}
        self._own: dict[str, _Own] = {}  # of each adapter that has some of the base's
        if adapters:
            start_magnitudes(model)  # DoRA's, which need the base's norms; what was trained comes next
        for index, adapter in enumerate(adapters):
            self._load(adapter, index)
        self._base_own = self._kept()
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
        self._set_own(self._own.get(name, {}))
        if not self._inner:
            return
        layers = self._model.base_model
        if name == BASE:
            layers.disable_adapter_layers()
            return
        layers.enable_adapter_layers()
        self._model.set_adapter(self._inner[name], inference_mode=True)

    def _load(self, adapter: AdapterFolder, index: int) -> None:
        tensors, parameters = adapter.tensors(), _parameters(self._model)
        places = _of_base(adapter, _taken_by_layers(self._model, index), parameters)
        order = {place: at for at, place in enumerate(parameters)}
        own = {}  # where a file has a tied weight twice, the later in the model counts, as in peft
        for name in sorted(places, key=lambda name: order[places[name]]):
            own[parameters[places[name]]] = tensors.pop(name)
        self._own[adapter.name] = {p: t for p, t in own.items() if not _same_values(p, t)}
        set_peft_model_state_dict(self._model, tensors, adapter_name=self._inner[adapter.name])

    def _kept(self) -> _Own:
        """Of the base, in host memory, what an adapter replaces."""
        replaced = {parameter for own in self._own.values() for parameter in own}
        return {parameter: parameter.detach().to("cpu", copy=True) for parameter in replaced}

    @torch.no_grad()
    def _set_own(self, wanted: _Own) -> None:
        for parameter, own in self._base_own.items():
            parameter.copy_(wanted.get(parameter, own))
