"""Screen: standard output and error as something that a run can lose without being harmed."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from lowvram.errors import refusals_of_the_system

# EPIPE of a pipe, EIO or ENXIO of a terminal; Windows says EINVAL of a pipe.
_NOBODY_READS = {errno.EPIPE, errno.EIO, errno.ENXIO} | ({errno.EINVAL} if os.name == "nt" else set())


class _Optional:
    """A stream that goes quiet, once and for all, when it cannot be written.

    `refused` is why, unless only nobody reads it any more.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False
        self.refused: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Any) -> None:
        if self._gone:
            return
        try:
            act()
        except OSError as error:
            self._gone = True
            if error.errno not in _NOBODY_READS:
                self.refused = error
            _silence(self._stream)
        except RuntimeError:  # "reentrant call": a signal's message, while a slow reader holds up a line
            pass


def _silence(stream: TextIO) -> None:
    """What the stream still holds goes nowhere: Python flushes it once more when it ends, and would fail."""
    with suppress(OSError, ValueError):  # one that is closed, or has no number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def optional_screen(stdout: bool = True) -> Iterator[None]:
    """While this lasts no print fails because `| head` has seen enough, or `tee` or the terminal is gone.

    Nor because a disk is full to which the screen goes: that takes no steps from a run, and is told at the
    end. Also a decorator.

    Args:
        stdout: false for a command whose result is what it prints there.

    Raises:
        DoesNotFitError, ConfigError: at the end, something could not be written although it would be read.
    """
    before = sys.stdout, sys.stderr
    ours = [_Optional(stream) if stream is not None else None for stream in before]
    sys.stderr = cast(TextIO, ours[1])
    if stdout:
        sys.stdout = cast(TextIO, ours[0])
    try:
        yield
    finally:
        for stream in ours[0 if stdout else 1 :]:
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
    with refusals_of_the_system("Not all could be printed", "Send the output to another place."):
        for stream in ours:
            if stream is not None and stream.refused is not None:
                raise stream.refused
