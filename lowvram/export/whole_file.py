"""A large file that appears whole, by a rename at the end, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(output: Path) -> Iterator[Path]:
    """A path beside `output` to write to; it takes its name at the end, on disk, or is removed."""
    partial = output.with_name(f".{output.name}.partial")
    partial.unlink(missing_ok=True)  # of a process that was killed
    try:
        yield partial
        with partial.open("rb+") as handle:
            os.fsync(handle.fileno())
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
