"""Alloc conf: what torch's allocators, malloc and oneDNN are told before torch is imported."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

VARIABLE = "PYTORCH_ALLOC_CONF"
PRIMITIVES_VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
# A CPU's 16-bit products keep code and buffers for each shape that was met, up to 1,024 of them, and batches
# have many lengths: 0.08 GiB more after each step of SmolLM2, against 0.01 with 64, for 4 % of its time.
_PRIMITIVES = "64"
# glibc raises this up to 32 MB by itself and then keeps what is freed between blocks that stay: the largest
# batch of SmolLM2 in 4 bits took 1.82 GiB of a CPU's memory where 1.50 are predicted, with 1 MiB 1.55.
MALLOC_VARIABLE = "MALLOC_MMAP_THRESHOLD_"
_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES = -3, 1 << 20
# Pages of 2 MiB then make up for the time that fresh pages take: 70,000 of them a step instead of 300,000.
PAGES_VARIABLE = "THP_MEM_ALLOC_ENABLE"
_NO_ROUNDING = "pinned_max_round_threshold_mb"


def alloc_conf() -> str:
    """Segments that grow, and pinned memory as large as was asked for."""
    settings = ["expandable_segments:True"]
    if _knows_no_rounding():
        settings.append(f"{_NO_ROUNDING}:1")
    return ",".join(settings)


def set_alloc_conf() -> None:
    """For this process and, but for what malloc is told, its children; what the user set stays."""
    os.environ.setdefault(VARIABLE, alloc_conf())
    os.environ.setdefault(PRIMITIVES_VARIABLE, _PRIMITIVES)
    os.environ.setdefault(PAGES_VARIABLE, "1")
    if MALLOC_VARIABLE not in os.environ and sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has no such setting
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)


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
