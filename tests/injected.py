"""Faults that are put into a process before its command runs."""

from __future__ import annotations

import os
import signal

from lowvram.training import checkpoint


def killed_at_save(number: int) -> None:
    """SIGKILL at the `number`-th sync of checkpoints to disk: in the middle of a save."""
    real, calls = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    save = checkpoint.save

    def saving(*args: object, **options: object) -> object:
        os.fsync = fsync
        try:
            return save(*args, **options)
        finally:
            os.fsync = real

    checkpoint.save = saving
