"""AdapterFolder: an adapter as peft saves it, described without loading a weight, and what it must fit."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file

from lowvram.engine.adapter_names import (
    CONFIG_FILE,
    OWN_STARTS,
    RESTORE,
    WEIGHTS_FILE,
    require_adapter_files,
)
from lowvram.engine.source import read_safetensors_header
from lowvram.errors import ConfigError, first_line, refusals_of_the_system

_FINISH = "Give a finished run, or a folder that peft's save_pretrained wrote."
_OTHER_KINDS = (
    *("lora_bias", "alora_invocation_tokens", "layer_replication"),
    *("trainable_token_indices", "kasa_config", "target_parameters"),
)


@dataclass(frozen=True)
class AdapterFolder:
    """One adapter, under the name by which it is asked for."""

    name: str
    folder: Path

    @cached_property
    def config(self) -> LoraConfig:
        """As peft reads it.

        Raises:
            ConfigError: no adapter, pickled weights, or a kind that cannot be switched on and off.
        """
        with refusals_of_the_system(f"The adapter '{self.folder}' cannot be read", "Check its permissions."):
            require_adapter_files(self.folder)
            try:
                config: Any = PeftConfig.from_pretrained(str(self.folder))
            except (ValueError, KeyError, TypeError) as error:
                reason = f"'{self.folder / CONFIG_FILE}' cannot be read by peft: {first_line(error)}"
                raise ConfigError(reason, _FINISH) from error
        if odd := _unsupported(config):
            raise ConfigError(
                f"The adapter '{self.folder}' uses {odd}, which cannot be switched on and off here.",
                "Merge it with peft's merge_and_unload, then give the merged folder.",
            )
        if not isinstance(config.r, int) or config.r < 1:
            raise ConfigError(f"'{self.folder / CONFIG_FILE}' says rank {config.r}.", RESTORE)
        return config

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor in the file, by its name there.

        Raises:
            ConfigError: the file is cut off or no safetensors file.
        """
        header = read_safetensors_header(self.folder / WEIGHTS_FILE)
        return {name: tuple(entry["shape"]) for name, entry in header.items()}

    @cached_property
    def on_vocabulary(self) -> bool:
        """Whether it changes embedding or head, which then have to be whole and on the device."""
        weights = (name for name in self.shapes if not name.endswith(".bias"))
        return any(not any(part.isdigit() for part in name.split(".")) for name in weights)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, in host memory."""
        loaded: dict[str, torch.Tensor] = load_file(self.folder / WEIGHTS_FILE)
        return loaded

    @property
    def alike_in_all_layers(self) -> bool:
        """Whether what it adds to one layer of the model it adds to each."""
        config = self.config
        targets = config.target_modules
        odd = (config.layers_to_transform, config.rank_pattern, config.alpha_pattern, config.exclude_modules)
        named = isinstance(targets, (set, list)) and not any(c.isdigit() for t in targets for c in f"{t}.")
        return named and not any(odd) and not config.modules_to_save

    def to_inject(self) -> LoraConfig:
        """As peft makes its layers of: nothing of it trains, and the base's biases are not its own.

        peft takes one adapter with biases to a model, and leaves the base changed by it.
        """
        config = copy.deepcopy(self.config)
        config.bias, config.inference_mode, config.init_lora_weights = "none", True, True
        config.base_model_name_or_path = None  # answering.py says it where it is another one
        return config


def _unsupported(config: Any) -> str:
    """What keeps such an adapter from being one of several; "" where nothing does."""
    if not isinstance(config, LoraConfig):
        return f"peft_type {getattr(config, 'peft_type', None)}"
    if config.init_lora_weights not in OWN_STARTS:
        return f"init_lora_weights {config.init_lora_weights}, which changes the base"
    return next((kind for kind in _OTHER_KINDS if getattr(config, kind, None)), "")
