"""An adapter's files by peft's names, which starts leave the base as it is, a rank that is wrong."""

from __future__ import annotations

from pathlib import Path

from lowvram.errors import ConfigError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
OWN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the others (pissa, olora, loftq ..) change it

RESTORE = "Restore it, for a run by removing its adapter folder and: lowvram resume RUN"


def wrong_rank(folder: Path, module: str, rank: int, found: tuple[int, int]) -> ConfigError:
    """The config of the adapter in `folder` says `rank`, and A and B are of the ranks `found`."""
    return ConfigError(
        f"'{folder / CONFIG_FILE}' says rank {rank} for '{module}', its factors are of rank {found[0]} and "
        f"{found[1]}.",
        RESTORE,
    )


def own_tokenizer(adapter: Path | None) -> Path | None:
    """The adapter's folder where a tokenizer was saved in it, with the chat template of the training."""
    return adapter if adapter is not None and (adapter / "tokenizer_config.json").is_file() else None


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
