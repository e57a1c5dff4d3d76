"""A large file or folder that appears whole or not at all, after a look at the free disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowvram.errors import DoesNotFitError
from lowvram.units import format_bytes


@contextmanager
def whole_file(output: Path) -> Iterator[Path]:
    """A path beside `output` to write to; it takes its name at the end, on disk, or is removed."""
    partial = output.with_name(f".{output.name}.partial")
    partial.unlink(missing_ok=True)  # of a process that was killed
    try:
        yield partial
        _to_disk(partial)
        partial.replace(output)
        _to_disk(output.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to fill; it takes its name at the end, or is removed."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            _to_disk(file)
        partial.replace(output)
        _to_disk(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_disk(output: Path, n_bytes: int, what: str) -> None:
    """Refuse what does not fit on the disk, before the first byte.

    Raises:
        DoesNotFitError: less than `n_bytes` are free where `output` will lie.
    """
    existing = next(p for p in (output, *output.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise DoesNotFitError(
            f"{what} needs {format_bytes(n_bytes)} of disk at '{existing}'; {format_bytes(free)} is free.",
            "Free some, or give an --output on another disk.",
        )


def _to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
