"""A peft LoRA folder read without its numbers: which module it changes, how, and where the factors lie."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowvram.engine.adapter_names import (
    CONFIG_FILE,
    OWN_STARTS,
    WEIGHTS_FILE,
    require_adapter_files,
    wrong_rank,
)
from lowvram.errors import ConfigError
from lowvram.export.tensor_files import StoredTensor, tensors_of_file

_PREFIX = "base_model.model."
_COPY = "Restore it, for a run by removing its adapter folder and: lowvram resume RUN"
_BY_PEFT = "Merge it with peft's merge_and_unload; this merge does not know it."
# What an adapter's config may say without another formula than the ones below; anything else is refused.
_KNOWN = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "task_type"),
    *("peft_version", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout"),
    *("fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "trainable_token_indices"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "qalora_group_size"),
    *("runtime_config", "lora_bias", "ensure_weight_tying", "velora_config"),
}
_SAID: dict[type, str] = {dict: "a mapping", list: "a list", str: "a text"}
# What JSON must hold under the names that are looked into: here, and by peft when the merge is verified.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    **dict.fromkeys(("target_modules", "exclude_modules"), (str, list)),
    "modules_to_save": (list,),
    "trainable_token_indices": (dict, list),
}


@dataclass
class ModuleUpdate:
    """What an adapter holds for one module, by peft's names for it."""

    a: StoredTensor | None = None  # [r, in], of an embedding [r, V]
    b: StoredTensor | None = None  # [out, r], of an embedding [H, r]
    scaling: float = 1.0
    is_embedding: bool = False
    magnitude: StoredTensor | None = None  # [out] of DoRA
    lora_bias: StoredTensor | None = None  # [out], added to the base's bias with the same scaling
    replaced: dict[str, StoredTensor] = field(default_factory=dict)  # "weight" or "bias" -> its new values
    token_rows: StoredTensor | None = None  # [n, H] new values of these rows
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """Module name in the model -> its update."""

    folder: Path
    config: dict[str, Any]
    modules: dict[str, ModuleUpdate]


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """The adapter's own description, adapter_config.json.

    Raises:
        ConfigError: it is no JSON object.
    """
    file = adapter / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"'{file}' is not JSON: {error}.", _COPY) from error
    if not isinstance(config, dict):
        raise ConfigError(f"'{file}' is not a JSON object.", _COPY)
    return config


def read_adapter(folder: Path) -> Adapter:
    """The adapter's config and the places of its tensors; no number is read.

    Raises:
        ConfigError: no adapter, pickled weights, a rank that is not the config's, or a kind of adapter that
            the merge does not know.
    """
    weights = folder / WEIGHTS_FILE
    require_adapter_files(folder)
    config = read_adapter_config(folder)
    _require_kinds(config, folder / CONFIG_FILE)
    _require_known(config)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors_of_file(weights).items()}
    modules: dict[str, ModuleUpdate] = {}
    for name, tensor in tensors.items():
        _place(modules, name, tensor)
    if not modules:
        raise ConfigError(f"'{weights}' is empty.", _COPY)
    for name, update in modules.items():
        _finish(name, update, config, folder / CONFIG_FILE)
    return Adapter(folder, config, modules)


def _require_kinds(config: dict[str, Any], file: Path) -> None:
    for name, kinds in _KINDS.items():
        value = config.get(name)
        listed = value if isinstance(value, list) else []
        if value is None or (isinstance(value, kinds) and all(isinstance(x, (str, int)) for x in listed)):
            continue
        wanted = " or ".join(_SAID[kind] for kind in kinds)
        raise ConfigError(f"'{file}' says {name} {value}, which is not {wanted} of names or numbers.", _COPY)


def _require_known(config: dict[str, Any]) -> None:
    odd = [f"{key} {value}" for key, value in config.items() if value and key not in _KNOWN]
    if config.get("peft_type") != "LORA":
        odd.append(f"peft_type {config.get('peft_type')}")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        odd.append(f"bias {config['bias']}")
    if config.get("init_lora_weights", True) not in OWN_STARTS:
        odd.append(
            f"init_lora_weights {config['init_lora_weights']}, which changed the base it was trained on"
        )
    if config.get("ensure_weight_tying") and not config.get("modules_to_save"):
        odd.append("ensure_weight_tying without modules_to_save")
    if odd:
        raise ConfigError(f"The adapter uses {', '.join(odd)}.", _BY_PEFT)


_FACTORS = {
    "lora_A.weight": ("a", False),
    "lora_B.weight": ("b", False),
    "lora_embedding_A": ("a", True),
    "lora_embedding_B": ("b", True),
    "lora_B.bias": ("lora_bias", False),
    "lora_magnitude_vector": ("magnitude", False),
    "lora_magnitude_vector.weight": ("magnitude", False),
    "token_adapter.trainable_tokens_delta": ("token_rows", False),
}


def _place(modules: dict[str, ModuleUpdate], name: str, tensor: StoredTensor) -> None:
    """Sort one tensor of the file into the update of its module."""
    for ending, (part, is_embedding) in _FACTORS.items():
        if name.endswith(f".{ending}"):
            update = modules.setdefault(name.removesuffix(f".{ending}"), ModuleUpdate())
            setattr(update, part, tensor)
            update.is_embedding |= is_embedding
            return
    module, _, parameter = name.rpartition(".")
    if "lora_" in name or "token_adapter" in name or not module:
        raise ConfigError(f"'{tensor.file}' holds '{name}', which is no part of a plain LoRA.", _BY_PEFT)
    modules.setdefault(module.removesuffix(".base_layer"), ModuleUpdate()).replaced[parameter] = tensor


def _finish(module: str, update: ModuleUpdate, config: dict[str, Any], file: Path) -> None:
    """Check what belongs together and take the numbers of the config that are this module's."""
    if update.token_rows is not None:
        update.token_ids = _token_ids(module, config.get("trainable_token_indices"), file)
        if len(update.token_ids) != update.token_rows.n_rows:
            raise ConfigError(
                f"'{file}' names {len(update.token_ids)} tokens of '{module}', the adapter holds "
                f"{update.token_rows.n_rows} rows.",
                _COPY,
            )
    needs_factors = update.magnitude or update.lora_bias or update.a or update.b
    if not needs_factors:
        return
    if update.a is None or update.b is None or len(update.a.shape) != 2 or len(update.b.shape) != 2:
        raise ConfigError(f"The adapter lacks a whole lora_A and lora_B of '{module}'.", _COPY)
    rank, update.scaling = _rank_and_scaling(module, config, file)
    found = update.a.shape[0], update.b.shape[1]
    if found != (rank, rank):
        raise wrong_rank(file.parent, module, rank, found)


def _rank_and_scaling(module: str, config: dict[str, Any], file: Path) -> tuple[int, float]:
    try:
        rank = int(_of_pattern(config.get("rank_pattern"), module, config["r"]))
        alpha = float(_of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
        return rank, float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
    except (KeyError, TypeError, ValueError, ArithmeticError, re.error) as error:
        raise ConfigError(f"'{file}' has no usable r and lora_alpha for '{module}'.", _COPY) from error


def _of_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """As peft looks a module up: the first pattern that matches the end of its name, from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _token_ids(module: str, indices: Any, file: Path) -> tuple[int, ...]:
    if isinstance(indices, dict):
        found: Iterable[Any] = next((v for k, v in indices.items() if module.endswith(k)), ())
    else:
        found = indices or ()
    try:
        return tuple(int(token) for token in found)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"'{file}' has no usable trainable_token_indices for '{module}'.", _COPY) from error
