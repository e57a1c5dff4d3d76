"""Levers that need a package of their own: taken where it is installed and runs, refused where it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowvram.engine.liger import can_compile, is_installed, require_liger, why_not_liger
from lowvram.engine.source import ModelSource
from lowvram.hardware import Hardware

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WRITTEN_FOR = (8, 0)  # and newer: what Liger names for its kernels


def picks_liger(source: ModelSource, hardware: Hardware) -> bool:
    """Whether a plan takes them without being asked: an NVIDIA card that they are for, and all they need."""
    suits = hardware.backend == "cuda" and (hardware.capability or _WRITTEN_FOR) >= _WRITTEN_FOR
    return suits and is_installed() and can_compile() and not why_not_liger(source.config)


def require_liger_on(backend: str, config: PretrainedConfig) -> None:
    """Refuse a lever that was asked for and could not run on this backend.

    Raises:
        ConfigError: as `require_liger`; a card that is only planned for needs no compiler here.
    """
    require_liger(config, "meta" if backend in ("cuda", "rocm") else backend)
