"""Faults that are put into a process before its command runs; what they hit is real."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.engine.adapters import trainable
from lowvram.export import merge
from lowvram.export.merged_tensors import MergedTensors
from lowvram.training import checkpoint, events, finish, loop, receipt
from lowvram.training.run import Run
from lowvram.training.run_folder import RunFolder

# What happens just before which function: the moments at which a run writes.
MOMENTS: dict[str, tuple[Any, str]] = {
    "metrics": (RunFolder, "append_metrics"),
    "save": (checkpoint, "save"),
    "adapter": (finish, "save_adapter"),
    "receipt": (finish, "write_receipt"),
    "merge": (merge, "write_shards"),
    "tensor": (MergedTensors, "pieces"),
}


def _before(moment: str, number: int, happens: Callable[[], None]) -> None:
    """`happens` before the `number`-th call."""
    owner, name = MOMENTS[moment]
    real, calls = getattr(owner, name), [0]

    def call(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            happens()
        return real(*args, **options)

    setattr(owner, name, call)


def killed_at_save(number: int) -> None:
    """SIGKILL at the `number`-th sync of checkpoints to disk: in the middle of a save."""
    real, calls = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    save = checkpoint.save

    def saving(*args: Any, **options: Any) -> Path:
        os.fsync = fsync
        try:
            return save(*args, **options)
        finally:
            os.fsync = real

    checkpoint.save = saving


def _around_steps(happens: Callable[[int, Run], None], before: bool) -> None:
    """`happens(number, run)` before or after each optimizer step of this process, its proof not counted."""
    real, calls = loop._step, [0]

    def step(run: Run, planned: Any) -> Any:
        calls[0] += 1
        if before:
            happens(calls[0], run)
        result = real(run, planned)
        if not before:
            happens(calls[0], run)
        return result

    loop._step = step


def slow_steps(seconds: float) -> None:
    """A larger model's: long enough for a signal from outside to come while one is under way."""

    def wait(_number: int, _run: Run) -> None:
        sys.stdout.write("a step begins\n")
        sys.stdout.flush()
        time.sleep(seconds)

    _around_steps(wait, before=True)


def interrupted(number: int) -> None:
    """Ctrl-C in the `number`-th step."""
    _before("metrics", number, lambda: os.kill(os.getpid(), signal.SIGINT))


def screen_goes(number: int, how: str, kind: str = "") -> None:
    """In the `number`-th step nobody reads both streams any more: `tee` was ended, the terminal closed.

    Args:
        kind: the signal that came with it.
    """

    def go() -> None:
        if how == "pipe":
            reader, writer = os.pipe()
            os.close(reader)
        else:
            reader, writer = os.openpty()
            os.close(reader)  # from now on EIO
        for stream in (1, 2):
            os.dup2(writer, stream)
        if kind:
            os.kill(os.getpid(), getattr(signal, kind))

    _before("metrics", number, go)


def signalled(moment: str, number: int, kind: str) -> None:
    """The process sends itself SIGKILL or SIGSTOP."""
    _before(moment, number, lambda: os.kill(os.getpid(), getattr(signal, kind)))


def disk_fills(moment: str, number: int, file: str) -> None:
    """Another program's `file` takes all room that the disk has left."""

    def fill() -> None:
        with open(file, "wb", buffering=0) as handle:
            for size in (1 << 20, 1 << 12):
                with suppress(OSError):
                    while True:
                        handle.write(bytes(size))

    _before(moment, number, fill)


def files_stay_small(moment: str, number: int, n_bytes: int) -> None:
    """As `ulimit -f` and some file systems have it: no file may grow beyond `n_bytes`."""
    import resource  # Windows has none

    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    _before(moment, number, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, most)))


def as_nobody(moment: str = "", number: int = 0, folder: str = "") -> None:
    """Without root's rights; `folder` is made read-only before `moment`."""
    if os.getuid() == 0:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    if moment:
        _before(moment, number, lambda: os.chmod(folder, 0o555))


def poisoned(number: int, value: float) -> None:
    """The update of the `number`-th step leaves `value` in the last weight of the adapter."""

    def poison(at: int, run: Run) -> None:
        if at == number:
            with torch.no_grad():
                list(trainable(run.model).values())[-1].view(-1)[0] = value

    _around_steps(poison, before=False)


def clock_jumps_back(number: int, days: float) -> None:
    """Every clock but the monotonic ones, in the `number`-th step."""

    def jump() -> None:
        back = timedelta(days=days)
        seconds, real, real_ns = back.total_seconds(), time.time, time.time_ns

        class Earlier(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Earlier:
                return super().now(tz) - back

        time.time = lambda: real() - seconds
        time.time_ns = lambda: real_ns() - int(1e9 * seconds)
        for module in (events, receipt):
            module.datetime = Earlier  # type: ignore[attr-defined]

    _before("metrics", number, jump)


class _Asked(TorchDispatchMode):
    """Writes down what is still asked of a device that does not answer."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self._file.open("a", encoding="utf-8") as handle:
            handle.write(f"{func}\n")
        return func(*args, **(kwargs or {}))


def device_lost(number: int, message: str, asked: str) -> None:
    """The `number`-th step's backward finds no device; what is asked of it afterwards goes to `asked`."""

    def lose(_loss: torch.Tensor) -> None:
        Path(asked).touch()
        _Asked(Path(asked)).__enter__()
        raise torch.AcceleratorError(message)

    def break_backward(at: int, run: Run) -> None:
        if at == number:
            vars(run.accelerator)["backward"] = lose

    _around_steps(break_backward, before=True)
