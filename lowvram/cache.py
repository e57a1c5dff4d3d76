"""The user's cache folder: models made here, receipts of finished runs, traced estimates, rates."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$LOWVRAM_CACHE, or ~/.cache/lowvram."""
    return Path(os.environ.get("LOWVRAM_CACHE") or Path.home() / ".cache" / "lowvram")


def receipts_folder() -> Path:
    """Where a copy of every finished run's receipt is kept, for the planner of the next run."""
    return cache_folder() / "receipts"


def traces_folder() -> Path:
    """Where traced estimates are remembered."""
    return cache_folder() / "traces"


def rates_folder() -> Path:
    """Where the measured rates of this machine's devices are remembered."""
    return cache_folder() / "rates"


def data_folder() -> Path:
    """Where tokenised data is remembered."""
    return cache_folder() / "data"
