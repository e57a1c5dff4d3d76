"""A folder that appears whole, by a rename at the end, or not at all; one process at a time makes it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lowvram.errors import ConfigError, DoesNotFitError
from lowvram.training.file_lock import HELD, lock
from lowvram.units import format_bytes


def refuse_used(output: Path) -> None:
    """Raises:
    ConfigError: something is at `output` already, other than an empty folder.
    """
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"'{output}' exists already.", "Give another --output; nothing was overwritten.")


def require_new_folder(output: Path) -> None:
    """Refuse, before the work, what `refuse_used` does and a place that takes no folder.

    Raises:
        ConfigError: `output` is in use.
        OSError: nothing can be made there.
    """
    refuse_used(output)
    folder = _existing(output.absolute().parent)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:  # which names the temporary file
        raise OSError(error.errno, error.strerror, str(folder)) from error


def require_disk(output: Path, n_bytes: int, what: str = "The merged model") -> None:
    """Raises:
    DoesNotFitError: the disk has too little room for `n_bytes` and 5 % more.
    """
    existing = _existing(output)
    stale = sum(f.stat().st_size for f in _partial(output).glob("*") if f.is_file())  # which goes first
    free, needed = shutil.disk_usage(existing).free + stale, int(1.05 * n_bytes)
    if free < needed:
        raise DoesNotFitError(
            f"{what} needs {format_bytes(needed)} of disk at '{existing}'; {format_bytes(free)} is free.",
            "Free some, or give an --output on another disk.",
        )


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


@contextmanager
def whole_or_not_at_all(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name at the end, or is removed: it is as large as a model.

    What a killed process left there is removed first.

    Raises:
        ConfigError: `output` is in use, or another process is writing it now.
    """
    refuse_used(output)
    partial = _partial(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with one_writer(output):
        try:
            refuse_used(output)  # the other process may have just finished
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            if output.exists():
                output.rmdir()
            partial.replace(output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


@contextmanager
def one_writer(output: Path) -> Iterator[None]:
    """While it lasts no other process makes `output`.

    The lock is a file of its own beside it, so that it is held until the rename is done; it goes last, and
    who locked it after it lost its name starts again.

    Raises:
        ConfigError: another process is writing it now.
    """
    file = output.with_name(f".{output.name}.lock")
    while True:
        handle = file.open("a+", encoding="utf-8")
        try:
            lock(handle)
        except OSError as error:
            handle.close()
            raise _refusal(output, error) from error
        if _is_at(handle, file):
            break
        handle.close()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            file.unlink()
        handle.close()
        with contextlib.suppress(OSError):
            if os.name == "nt":
                file.unlink()


def _is_at(handle: IO[str], file: Path) -> bool:
    """Whether the open file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _refusal(output: Path, error: OSError) -> ConfigError:
    if error.errno in HELD:
        return ConfigError(
            f"Another process is writing '{output}' now.", "Wait for it, or give another --output."
        )
    return ConfigError(
        f"'{output}' cannot be locked against a second process: {error.strerror}.",
        "Give an --output on a local disk.",
    )
