"""The base of every object that crosses a room's door, and the safe way to put it on disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from lowvram.errors import ConfigError, refusals_of_the_system
from lowvram.shell import typed


class Frozen(BaseModel):
    """An immutable pydantic model; an unknown key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


def require_new_file(path: Path, flag: str = "--output") -> None:
    """Refuse a `path` that is there already or cannot be written, before the work whose result it will hold.

    Raises:
        ConfigError: something is there, or its folder is missing or takes no file.
    """
    with refusals_of_the_system(f"'{path}' cannot be written", f"Give an {flag} in a folder of yours."):
        if os.path.lexists(path):
            raise ConfigError(f"'{path}' exists already.", f"Give another {flag}; nothing was overwritten.")
        if not path.parent.exists():
            raise ConfigError(
                f"There is no folder '{path.parent}'.", f"Make it: mkdir -p {typed(path.parent)}"
            )
        tempfile.TemporaryFile(dir=path.parent).close()  # permission bits alone do not tell


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` whole or not at all: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
