"""What the system or the device refuses during a run, as our errors: what is safe, and how to go on."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from lowvram.errors import NO_ROOM, ConfigError, DeviceLostError, DoesNotFitError, LowvramError, first_line
from lowvram.shell import typed
from lowvram.training import checkpoint
from lowvram.training.run_folder import RunFolder
from lowvram.units import format_bytes

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_OF_A_DISK = (*_READ_ONLY, errno.EIO)  # without a file's name others could come from a tracker's network
# The driver's words when the device is gone: after any of them every call fails until the process ends. An
# illegal address or a failed assertion ends a process too, but those are bugs and keep their traceback.
_LOST = re.compile(
    r"unspecified launch failure|launch timed out|uncorrectable ECC|NVLink error|fallen off the bus|"
    r"(?:device|GPU) (?:is |was )?(?:lost|hung|removed)|DEVICE_(?:LOST|HUNG|REMOVED)|\bXid\b|"
    r"no (?:CUDA-capable|ROCm-capable) device|devices? is/are busy or unavailable|"
    r"driver shutting down|(?:CUDA|HIP) error: unknown error",
    re.IGNORECASE,
)


@contextmanager
def told_as_ours(folder: RunFolder) -> Iterator[None]:
    """Tell a refusal while a run goes on as one of our errors.

    Raises:
        DeviceLostError: the GPU stopped answering. Nothing is asked of it any more.
        DoesNotFitError: the disk or the quota is full.
        ConfigError: the run's folder is read-only, gone, or on a disk that fails.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        failure = _device_lost(error, folder) or _refused_by_system(error, folder)
        if failure is None:
            raise
        raise failure from error


def _device_lost(error: BaseException, folder: RunFolder) -> DeviceLostError | None:
    """An error of a lost device may be hidden by that of cleaning up after it, which asked the device too."""
    causes: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in causes:
        causes.append(at)
        at = at.__cause__ or at.__context__
    for cause in causes:
        if isinstance(cause, RuntimeError) and _LOST.search(str(cause)):
            said = first_line(cause).rstrip(".")
            return DeviceLostError(
                f"The device stopped answering while training: {said}. "
                f"{checkpoint.what_is_safe(folder.checkpoints)}",
                "See what the driver says (NVIDIA: sudo dmesg | grep -i xid); if nvidia-smi does not answer, "
                f"reboot. Then: lowvram resume {typed(folder.path)}",
            )
    return None


def _refused_by_system(error: BaseException, folder: RunFolder) -> LowvramError | None:
    number = checkpoint.error_number(error)
    if number is None:
        return None
    file, safe = getattr(error, "filename", None), checkpoint.what_is_safe(folder.checkpoints)
    if number in NO_ROOM:
        free = format_bytes(shutil.disk_usage(folder.path).free)
        return DoesNotFitError(
            f"{file or folder.path} cannot be written: {os.strerror(number)}; {free} is free. {safe}",
            f"Free some room, then: lowvram resume {typed(folder.path)}",
        )
    ours = number in _OF_A_DISK if file is None else str(file).startswith(str(folder.path))
    if not ours:
        return None
    why = "it is read-only for you" if number in _READ_ONLY else os.strerror(number)
    return ConfigError(
        f"{file or folder.path} cannot be written: {why}. {safe}",
        f"Put that right, then: lowvram resume {typed(folder.path)}",
    )
