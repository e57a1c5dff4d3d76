"""A lock on an open file that the system releases with its process, and a look at who has it."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # the systems' answers when another process has it
_TRIES, _PAUSE_SECONDS = 40, 0.05  # 2 s: on a loaded machine a look may be set aside while it has the lock


def lock(handle: IO[str]) -> None:
    """Take the lock. A look of `holder_of` takes it for microseconds, which must refuse nobody: it retries.

    Raises:
        OSError: another process has it (HELD), or there are no locks on this disk.
    """
    for _ in range(_TRIES - 1):
        try:
            _take(handle)
        except OSError as error:
            if error.errno not in HELD:
                raise
            time.sleep(_PAUSE_SECONDS)
        else:
            return
    _take(handle)


def holder_of(file: Path) -> str | None:
    """The process number written in `file` while that process has the lock; None when nobody has it.

    Only by asking for it does the system tell who has a lock, so this shares it for a moment where it is free
    (on Windows: takes it). A number alone would not do: after a crash it may be another program's.
    """
    try:
        with file.open(encoding="utf-8", errors="replace") as handle:
            try:
                _take(handle, shared=True)
            except OSError as error:
                handle.seek(0)
                return handle.read().strip() or "unknown" if error.errno in HELD else None
            unlock(handle)
    except FileNotFoundError:
        pass
    return None


if sys.platform == "win32":
    # Windows locks bytes, and nobody else may read those: one far behind the pid leaves it readable.
    _FAR = 1 << 30

    def _take(handle: IO[str], shared: bool = False) -> None:  # noqa: ARG001  only whole locks there
        os.lseek(handle.fileno(), _FAR, os.SEEK_SET)
        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)

    def unlock(handle: IO[str]) -> None:
        os.lseek(handle.fileno(), _FAR, os.SEEK_SET)
        msvcrt.locking(handle.fileno(), msvcrt.LK_UNLCK, 1)

else:

    def _take(handle: IO[str], shared: bool = False) -> None:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(handle, kind | fcntl.LOCK_NB)

    def unlock(handle: IO[str]) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)
