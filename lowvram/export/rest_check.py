"""Whether transformers loads what a merged folder gets besides its weights, asked before one is written."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, first_line
from lowvram.export.base_files import holds_tokenizer, tokenizer_folder, write_rest

_TEXT = "At 7, the two of them had 25 apples."


def require_loadable_rest(base: ModelSource, adapter: Path | None, changes: dict[str, Any]) -> None:
    """Write configs and tokenizer to a place of their own, some MB, and load them there.

    Args:
        base: a local folder.

    Raises:
        ConfigError: one of them is broken; the weights, gigabytes, would have been written for nothing.
    """
    with TemporaryDirectory(prefix="lowvram-") as name:
        folder = Path(name)
        write_rest(Path(base.name), adapter, folder, changes)
        source = ModelSource(name, base.trust_remote_code)
        _ = source.config
        _require_generation_config(folder, Path(base.name))
        if holds_tokenizer(folder):
            _require_tokenizer(source, tokenizer_folder(Path(base.name), adapter))


def _require_generation_config(folder: Path, base: Path) -> None:
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(
            f"transformers cannot load '{base / 'generation_config.json'}': {first_line(error)}",
            "Download it again, or remove it: transformers makes one of config.json.",
        ) from error


def _require_tokenizer(source: ModelSource, origin: Path) -> None:
    try:
        n_tokens, why = len(source.tokenizer(_TEXT).input_ids), "it has no tokens"
    except ConfigError as error:
        if "trust_remote_code" in error.message:  # the tokenizer's own code, which is copied and not run
            return
        n_tokens, why = 0, first_line(error.__cause__)
    if n_tokens < 2:  # transformers makes an empty one where a config says of what kind it was
        raise ConfigError(
            f"The tokenizer in '{origin}' cannot be loaded: {why}.",
            "Restore its files there, or remove them all, so that the base's tokenizer is taken.",
        )
