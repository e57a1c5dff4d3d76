"""How peft names an adapter's two files, and which of its initialisations leave the base as it is."""

from __future__ import annotations

from pathlib import Path

from lowvram.errors import ConfigError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
OWN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the others (pissa, olora, loftq ..) change it


def require_adapter_files(folder: Path) -> None:
    """Refuse a folder without both files.

    Raises:
        ConfigError: one is missing, or the weights are pickled.
    """
    if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
        return
    pickled = (folder / "adapter_model.bin").is_file()
    detail = " (adapter_model.bin is pickled and is not read)" if pickled else ""
    raise ConfigError(
        f"'{folder}' holds no {CONFIG_FILE} with {WEIGHTS_FILE}{detail}.",
        "Give a finished run, or a folder that peft's save_pretrained wrote.",
    )
