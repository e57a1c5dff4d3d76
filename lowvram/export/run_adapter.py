"""Where the adapter of a run lies and which base it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowvram.engine.adapter_names import CONFIG_FILE, WEIGHTS_FILE, own_tokenizer
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.adapter_files import read_adapter_config
from lowvram.file_hash import file_sha256
from lowvram.shell import typed
from lowvram.training.run_folder import RunFolder


def adapter_of(run: Path) -> Path:
    """The adapter's folder: of a run, or `run` itself.

    Raises:
        ConfigError: there is none, or its weights are not those that the run wrote.
    """
    adapter = run if (run / CONFIG_FILE).is_file() else run / "adapter"
    if not (adapter / CONFIG_FILE).is_file():
        raise ConfigError(
            f"'{run}' holds no finished adapter.",
            f"Finish it first: lowvram resume {typed(run)}, or check the path.",
        )
    _require_hash(run, adapter)
    return adapter


def _require_hash(run: Path, adapter: Path) -> None:
    """Whether the run's weights are still those that it wrote; nobody knows of a lone adapter's."""
    result = RunFolder(run).finished() if adapter != run else None
    wanted = result.adapter_sha256 if result else None
    found = file_sha256(adapter / WEIGHTS_FILE) if wanted else None
    if found != wanted:
        raise ConfigError(
            f"'{adapter / WEIGHTS_FILE}' is not what the run wrote: its SHA-256 is {found}, not {wanted}.",
            f"Write it anew from the checkpoints: rm -r {typed(adapter)}, then: lowvram resume {typed(run)}",
        )


def base_of(adapter: Path) -> str:
    """The base that the adapter's config names.

    Raises:
        ConfigError: it names none.
    """
    name = read_adapter_config(adapter).get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"The adapter in {adapter} does not name its base model.", "Give it: --base PATH")
    return str(name)


def tokenizer_of(adapter: Path | None, source: ModelSource) -> Any:
    """The adapter's own, else the base's."""
    own = own_tokenizer(adapter)
    return (ModelSource(str(own)) if own else source).tokenizer


def source_of(adapter: Path, base: str | None, again: str) -> ModelSource:
    """The base model, `base` if it is given.

    Args:
        again: what the user typed, whole, for the remedy.

    Raises:
        ConfigError: it is a folder that is gone, or an empty name.
    """
    if base == "":
        raise ConfigError("--base is empty.", "Give the base's folder or hub id, or leave --base out.")
    source = ModelSource(base or base_of(adapter))
    if base is None and Path(source.name).is_absolute() and not source.is_local:
        raise ConfigError(
            f"The base model's folder '{source.name}' is gone.",
            f"Say where it is now: {again} --base PATH",
        )
    return source
