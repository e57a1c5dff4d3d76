"""The base model's files besides its weights: fetched where needed, and copied into what is exported."""

from __future__ import annotations

from pathlib import Path

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError

LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", *LICENSES)


def base_folder(base: ModelSource) -> Path:
    """The base's local folder, downloaded if it is a hub id.

    Raises:
        ConfigError: it cannot be had.
    """
    if base.is_local:
        return Path(base.name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(base.name, allow_patterns=["*.safetensors", *COPIED, "tokenizer*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ConfigError(
            f"The base model '{base.name}' is neither a folder nor reachable on the hub.",
            "Check the connection, or say where the model is: --base PATH",
        ) from error
