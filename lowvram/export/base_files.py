"""What a model folder holds besides its weights: fetched, completed, freed of paths, and written anew."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from lowvram.engine.adapter_names import own_tokenizer
from lowvram.engine.source import SINGLE_FILE, ModelSource, local_shards, weight_map
from lowvram.errors import ConfigError
from lowvram.file_hash import file_sha256
from lowvram.frozen import write_atomically

_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*"),
    *("merges.txt", "spiece.model", "sentencepiece*.model"),
)
_LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
_OTHER = ("preprocessor_config.json", "processor_config.json", *_LICENSES)
_PATH_KEYS = ("name_or_path", "_file", "_path", "_dir")  # where transformers has left its writer's folders


def base_folder(base: ModelSource) -> Path:
    """The base's local folder, downloaded if it is a hub id.

    Raises:
        ConfigError: it cannot be had.
    """
    if base.is_local:
        return Path(base.name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = [SINGLE_FILE, "*.json", "*.py", "README.md", *_TOKENIZER, *_LICENSES]
    try:
        folder = Path(snapshot_download(base.name, allow_patterns=wanted))
        if shards := sorted(set(weight_map(folder).values())):  # not Mistral's consolidated one of 14 GB too
            snapshot_download(base.name, revision=folder.name, allow_patterns=shards)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ConfigError(
            f"The base model '{base.name}' is neither a folder nor reachable on the hub.",
            "Check the connection, or say where the model is: --base PATH",
        ) from error
    _require_hashes(folder)
    return folder


def _require_hashes(folder: Path) -> None:
    """The hub's cache names a large file by its SHA-256; reading a 7B's files for it takes half a minute."""
    for shard in local_shards(folder):
        blob = shard.resolve()
        if re.fullmatch(r"[0-9a-f]{64}", blob.name) and (found := file_sha256(blob)) != blob.name:
            raise ConfigError(
                f"'{shard.name}' in the hub's cache is damaged: its SHA-256 is {found}, not {blob.name}.",
                f"Have it downloaded again: rm {blob}, and repeat the command.",
            )


def write_rest(base: Path, adapter: Path | None, output: Path, changes: dict[str, Any]) -> None:
    """Configs with `changes`, licence, and tokenizer with chat template, the adapter's own if it has one.

    No file keeps a path or a name of the machine on which it was written.
    """
    for folder, patterns in ((base, _OTHER), (tokenizer_folder(base, adapter), _TOKENIZER)):
        for file in _matching(folder, patterns):
            _copy(file, output / file.name)
    config = _read_json(base / "config.json")
    if "auto_map" in config:  # the model's own code, without which its config means nothing
        for file in _matching(base, ("*.py",)):
            _copy(file, output / file.name)
    _write_json(output / "config.json", _changed(config, changes))
    _write_generation_config(base, output)


def tokenizer_folder(base: Path, adapter: Path | None) -> Path:
    """Whose tokenizer a merged model gets."""
    return own_tokenizer(adapter) or base


def holds_tokenizer(folder: Path) -> bool:
    """Whether there is more of it than a chat template."""
    return any(not file.name.startswith("chat_template") for file in _matching(folder, _TOKENIZER))


def copy_tokenizer(folder: Path, output: Path) -> None:
    """Tokenizer and chat template alone."""
    for file in _matching(folder, _TOKENIZER):
        _copy(file, output / file.name)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not file.name.endswith((".bin", ".pt", ".safetensors")))


def _copy(file: Path, target: Path) -> None:
    """As it is, but JSON without its writer's paths; a tokenizer of megabytes holds none."""
    if file.suffix == ".json" and not file.name.startswith(("tokenizer.", "vocab.")):
        _write_json(target, _read_json(file))
    else:
        shutil.copyfile(file, target)


def _read_json(file: Path) -> Any:
    try:
        return _without_paths(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{file}' cannot be read as JSON: {error}.", "Download it again.") from error


def _write_json(file: Path, value: Any) -> None:
    write_atomically(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _without_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: item for key, item in value.items() if not (key.endswith(_PATH_KEYS) and _is_path(item))}
    return {key: _without_paths(item) for key, item in kept.items()}


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", ".", "\\")))


def _changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With `changes`, in a nested text model's part too where it says the same thing."""
    changes = dict(changes)
    if "dtype" in changes and "torch_dtype" in config:  # as transformers 4 calls it
        changes["torch_dtype"] = changes.pop("dtype")
    nested = {
        name: {**part, **{key: value for key, value in changes.items() if key in part}}
        for name, part in config.items()
        if name == "text_config" and isinstance(part, dict)
    }
    return {**config, **nested, **changes}


def _write_generation_config(base: Path, output: Path) -> None:
    """The base's, or what transformers makes of a config that comes without one."""
    if (base / "generation_config.json").is_file():
        _copy(base / "generation_config.json", output / "generation_config.json")
        return
    from transformers import GenerationConfig

    GenerationConfig.from_model_config(ModelSource(str(base)).config).save_pretrained(str(output))
