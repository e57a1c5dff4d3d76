"""A large file that appears whole, by a rename at the end, or not at all; one process at a time makes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowvram.export.partial_folder import one_writer
from lowvram.frozen import require_new_file


@contextmanager
def whole_file(output: Path) -> Iterator[Path]:
    """A path beside `output` to write to; it takes its name at the end, on disk, or is removed.

    Raises:
        ConfigError: `output` is there already, its folder is not, or another process is writing it now.
    """
    require_new_file(output)
    partial = output.with_name(f".{output.name}.partial")
    with one_writer(output):
        try:
            require_new_file(output)  # the other process may have just finished
            partial.unlink(missing_ok=True)  # of a process that was killed
            yield partial
            with partial.open("rb+") as handle:
                os.fsync(handle.fileno())
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)
