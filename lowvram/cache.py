"""The user's cache folder: models made here, receipts of finished runs, traced estimates, rates."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from contextlib import suppress
from functools import cache
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
    """Where tokenised data is remembered; if that cannot be written, where it is until this process ends."""
    folder = cache_folder() / "data"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return _until_the_end()


@cache
def _until_the_end() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lowvram-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
