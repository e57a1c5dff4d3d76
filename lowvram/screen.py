"""Screen: standard output and error as something that a run can lose without being harmed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class _Optional:
    """A stream that goes quiet, once and for all, when nobody reads it any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

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
        except OSError:  # EPIPE of a pipe, EIO of a terminal
            self._gone = True
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
def optional_screen() -> Iterator[None]:
    """While this lasts no print fails because `| head` has seen enough, or `tee` or the terminal is gone.

    Also a decorator. Only for commands whose result is not what they print.
    """
    before = sys.stdout, sys.stderr
    ours = [_Optional(stream) if stream is not None else None for stream in before]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in ours)
    try:
        yield
    finally:
        for stream in ours:
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
