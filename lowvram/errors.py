"""The error tree: every failure a user can cause or meet, with its exit code and the next thing to type."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class LowvramError(Exception):
    """What went wrong, with its numbers, and in `remedy` the next thing to type.

    Only the command line catches it: prints both lines, exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class ConfigError(LowvramError):
    """A flag, a plan, a model or a folder that cannot be used as given."""

    exit_code = 2


class DoesNotFitError(LowvramError):
    """GPU memory, host memory or disk is too small for what was asked."""

    exit_code = 3


class OutOfMemoryError(LowvramError):
    """The device ran out of memory while training."""

    exit_code = 4


class DataError(LowvramError):
    """Bad training data; the message starts with FILE:LINE."""

    exit_code = 5


class DeviceLostError(LowvramError):
    """The device stopped answering while training; until this process ends it can be asked nothing more."""

    exit_code = 6


class MergeError(LowvramError):
    """A merged model was written and does not compute what base and adapter do."""


class StoppedError(LowvramError):
    """SIGINT, SIGTERM or SIGHUP: the step was finished and saved; exit code 128 + signal."""

    def __init__(self, message: str, remedy: str, signal_number: int) -> None:
        super().__init__(message, remedy)
        self.exit_code = 128 + signal_number


def first_line(error: object) -> str:
    """The first line of an error that says something, shortened; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


# A full disk, a full quota, and a file that a file system or `ulimit -f` lets grow no further.
NO_ROOM = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)


@contextmanager
def refusals_of_the_system(what: str, remedy: str, no_room: str = "") -> Iterator[None]:
    """Say what the system would not let us do (no permission, no such folder, no room) as one of our errors.

    Args:
        no_room: the remedy for a full disk, where it is another one.

    Raises:
        DoesNotFitError: the disk or the quota is full.
        ConfigError: anything else that the system refuses.
    """
    try:
        yield
    except OSError as error:
        named = f": {error.filename}" if error.filename else ""
        said = f"{what}: {error.strerror or error}{named}."
        if error.errno in NO_ROOM:
            raise DoesNotFitError(said, no_room or remedy) from error
        raise ConfigError(said, remedy) from error
