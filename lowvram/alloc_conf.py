"""Alloc conf: what torch's allocators and oneDNN are told, in the environment, before torch is imported."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

VARIABLE = "PYTORCH_ALLOC_CONF"
PRIMITIVES_VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
# A CPU's 16-bit products keep code and buffers for each shape that was met, up to 1,024 of them, and batches
# have many lengths: 0.08 GiB more after each step of SmolLM2, against 0.01 with 64, for 4 % of its time.
_PRIMITIVES = "64"
_NO_ROUNDING = "pinned_max_round_threshold_mb"


def alloc_conf() -> str:
    """Segments that grow, and pinned memory as large as was asked for."""
    settings = ["expandable_segments:True"]
    if _knows_no_rounding():
        settings.append(f"{_NO_ROUNDING}:1")
    return ",".join(settings)


def set_alloc_conf() -> None:
    """For this process and its children; what the user set stays."""
    os.environ.setdefault(VARIABLE, alloc_conf())
    os.environ.setdefault(PRIMITIVES_VARIABLE, _PRIMITIVES)


def rounds_pinned_memory() -> bool:
    """Whether torch rounds each block of pinned memory up to a power of two, as it does unless told."""
    return _NO_ROUNDING not in os.environ.get(VARIABLE, "")


def _knows_no_rounding() -> bool:
    """torch 2.13 does; a version that does not would refuse to start."""
    try:
        major, minor = version("torch").split(".")[:2]
    except (PackageNotFoundError, ValueError):
        return False
    return (int(major), int(minor)) >= (2, 13)
