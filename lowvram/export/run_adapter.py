"""Where the adapter of a run lies and which base it names."""

from __future__ import annotations

from pathlib import Path

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.adapter_files import CONFIG_FILE, read_adapter_config


def adapter_of(run: Path) -> Path:
    """The adapter's folder: of a run, or `run` itself.

    Raises:
        ConfigError: there is none.
    """
    adapter = run if (run / CONFIG_FILE).is_file() else run / "adapter"
    if not (adapter / CONFIG_FILE).is_file():
        raise ConfigError(
            f"'{run}' holds no finished adapter.",
            f"Finish it first: lowvram resume {run}, or check the path.",
        )
    return adapter


def base_of(adapter: Path) -> str:
    """The base that the adapter's config names.

    Raises:
        ConfigError: it names none.
    """
    name = read_adapter_config(adapter).get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"The adapter in {adapter} does not name its base model.", "Give it: --base PATH")
    return str(name)


def source_of(run: Path, adapter: Path, base: str | None, command: str) -> ModelSource:
    """The base model, `base` if it is given.

    Args:
        command: what the user typed, such as "lowvram merge", for the remedy.

    Raises:
        ConfigError: it is a folder that is gone.
    """
    source = ModelSource(base or base_of(adapter))
    if base is None and Path(source.name).is_absolute() and not source.is_local:
        raise ConfigError(
            f"The base model's folder '{source.name}' is gone.",
            f"Say where it is now: {command} {run} --base PATH",
        )
    return source
