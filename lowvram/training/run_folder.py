"""The run folder: where each file of a run lies, one process at a time, and metrics that survive a crash."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lowvram.errors import ConfigError, DoesNotFitError
from lowvram.frozen import write_atomically
from lowvram.shell import typed
from lowvram.training.events import Event
from lowvram.training.file_lock import HELD, holder_of, lock, unlock
from lowvram.training.metrics import StepRecord
from lowvram.training.result import RunResult
from lowvram.units import format_bytes

LOCK = ".lock"
SHOWN_NAMES = 5
_DATA_ENDINGS = {".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz", ".zst", ".bz2", ".xz"}


class RunFolder:
    """One run on disk. `create` for a new one, `open` for one that is there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def receipt_file(self) -> Path:
        return self.path / "receipt.json"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """A new, empty run folder at `path`, with its parents.

        Raises:
            ConfigError: a run or foreign files are there, or nothing can be written there.
        """
        run = cls(path)
        try:
            run._require_unused()
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path) as handle:  # permission bits alone do not tell
                handle.write(b"\0")
        except OSError as error:
            raise _unwritable(path, error) from error
        return run

    @classmethod
    def refuse_used(cls, path: Path) -> None:
        """Say early, before minutes of planning, what `create` would say, and make nothing.

        Raises:
            ConfigError: a run or foreign files are at `path`, or nothing can be written there.
        """
        try:
            cls(path)._require_unused()
            with tempfile.TemporaryFile(dir=_existing(path)):  # permission bits alone do not tell
                pass
        except OSError as error:
            raise _unwritable(path, error) from error

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The run at `path`.

        Raises:
            ConfigError: there is none.
        """
        run = cls(path)
        try:
            if run._holds_run():
                return run
            found, remedy = _contents(path), _which_run(path)
        except OSError as error:
            found, remedy = f"it cannot be read, {error.strerror}", "Check its permissions."
        raise ConfigError(f"{path} holds no run: {found}.", remedy)

    def require_sound(self) -> None:
        """Checks that every part is there as what it has to be, before a model is loaded to continue.

        Raises:
            ConfigError: a file is a folder, a folder is a file, or plan.yaml is missing.
        """
        if not self.plan_file.exists():
            raise ConfigError(f"{self.plan_file} is missing.", "Restore it; a run cannot go on without it.")
        again = f"then: lowvram resume {typed(self.path)}"
        for file in (
            self.plan_file,
            self.metrics_file,
            self.events_file,
            self.result_file,
            self.receipt_file,
            self.path / LOCK,
        ):
            if file.is_dir():
                raise ConfigError(f"{file} is a folder, not a file.", f"Move it away, {again}")
        for folder in (self.checkpoints, self.adapter):
            if folder.exists() and not folder.is_dir():
                raise ConfigError(f"{folder} is a file, not a folder.", f"Move it away, {again}")

    def finished(self) -> RunResult | None:
        """The run's result when it ended: a result that can be read and the adapter it is about."""
        weights = self.adapter / "adapter_model.safetensors"
        if not (weights.is_file() and (self.adapter / "adapter_config.json").is_file()):
            return None
        try:
            return RunResult.model_validate_json(self.result_file.read_bytes())
        except (OSError, ValueError):
            return None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process. The system lets go of it when the process ends, however it does.

        Raises:
            ConfigError: another process has it.
        """
        try:
            handle = (self.path / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        with handle:
            self._take(handle)
            handle.truncate(0)  # "a" writes at the end, wherever reading left off
            handle.write(str(os.getpid()))
            handle.flush()
            try:
                yield
            finally:
                # The file stays: a process that was about to lock it would lock a file without a name.
                unlock(handle)

    def holder(self) -> str | None:
        """The number of the process that trains in this folder now, None when none does; changes nothing."""
        return holder_of(self.path / LOCK)

    def append_metrics(self, record: StepRecord) -> None:
        """Adds one line to metrics.jsonl. It has left this process when the call returns."""
        _append(self.metrics_file, _as_line(record))

    def append_event(self, event: Event) -> None:
        """Adds one line to events.jsonl, which is never cut: what happened has happened."""
        _append(self.events_file, event.model_dump_json() + "\n")

    def read_events(self) -> list[Event]:
        """Every event but what a crash cut short."""
        if not self.events_file.exists():
            return []
        lines = self.events_file.read_text(encoding="utf-8", errors="replace").split("\n")
        events = []
        for line in lines:
            with contextlib.suppress(ValueError):
                events.append(Event.model_validate_json(line))
        return events

    def drop_metrics_after(self, step: int) -> None:
        """Removes the lines that a run resumed at `step` will write again, and what a crash left torn."""
        if not self.metrics_file.exists():
            return
        records = [record for _, record in self._lines() if record is not None and record.step <= step]
        write_atomically(self.metrics_file, "".join(_as_line(record) for record in records))

    def replace_metrics(self, record: StepRecord) -> None:
        """Puts `record` in the place of the one of its step."""
        records = (record if known.step == record.step else known for known in self.read_metrics())
        write_atomically(self.metrics_file, "".join(_as_line(known) for known in records))

    def read_metrics(self) -> list[StepRecord]:
        """Every step's record. A last line that a crash cut short is left out.

        Raises:
            ConfigError: another line is no record.
        """
        lines = self._lines() if self.metrics_file.exists() else []
        torn = next((number for number, record in lines[:-1] if record is None), None)
        if torn is not None:
            raise ConfigError(f"{self.metrics_file}:{torn} is not the record of a step.", "Delete that line.")
        return [record for _, record in lines if record is not None]

    def _lines(self) -> list[tuple[int, StepRecord | None]]:
        # What a power cut leaves in the last block need not be text.
        text = self.metrics_file.read_text(encoding="utf-8", errors="replace")
        lines = enumerate(text.split("\n"), start=1)
        return [(number, _parse(line)) for number, line in lines if line.strip()]

    def _holds_run(self) -> bool:
        return any(part.exists() for part in (self.plan_file, self.checkpoints, self.adapter))

    def _require_unused(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, not a folder.", "Give another --output.")
        if self._holds_run():
            remedy = f"lowvram resume {typed(self.path)}, or give another --output"
            raise ConfigError(f"{self.path} already holds a run.", remedy)
        if self.path.is_dir() and _names(self.path):
            found = f"{self.path} holds files of something else: {_contents(self.path)}."
            raise ConfigError(found, "Give another --output.")

    def _take(self, handle: IO[str]) -> None:
        try:
            lock(handle)
        except OSError as error:
            if error.errno not in HELD:
                raise ConfigError(
                    f"{self.path} cannot be locked against a second process: {error.strerror}.",
                    "Give an --output on a local disk.",
                ) from error
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            raise ConfigError(
                f"another lowvram process (pid {owner}) is training in {self.path}.",
                "Wait for it, stop it, or give another --output.",
            ) from error


def default_path(root: Path, model: str, data: str) -> Path:
    """`root`/{model}-{data}, with -2, -3 and so on when it is taken.

    >>> default_path(Path("runs"), "Qwen/Qwen2.5-0.5B", "data/train.jsonl")  # doctest: +SKIP
    PosixPath('runs/Qwen2.5-0.5B-train')
    """
    name = f"{_leaf(model) or 'model'}-{_without_endings(_leaf(data)) or 'data'}"
    path = root / name
    number = 1
    while os.path.lexists(path):
        number += 1
        path = path.with_name(f"{name}-{number}")
    return path


def require_disk(
    folder: Path,
    needed_bytes: int,
    what: str = "The run",
    elsewhere: str = "give an --output on another disk",
) -> None:
    """Checks that `folder`, which need not exist yet, has room for `what`.

    Raises:
        DoesNotFitError: it has less than `needed_bytes`.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed_bytes:
        raise DoesNotFitError(
            f"{what} needs {format_bytes(needed_bytes)} of disk, {folder} has {format_bytes(free)} free.",
            f"Free {format_bytes(needed_bytes - free)}, or {elsewhere}.",
        )


def _append(file: Path, line: str) -> None:
    """After a line that a kill or a full disk cut short, on a line of its own."""
    with file.open("ab+") as handle:
        if handle.tell():
            handle.seek(-1, os.SEEK_END)
            line = line if handle.read(1) == b"\n" else f"\n{line}"
        handle.write(line.encode())


def _as_line(record: StepRecord) -> str:
    """JSON has no NaN. As text it is still JSON, and StepRecord reads it back as the number."""
    values = record.model_dump()
    values["machine"] = record.machine and record.machine.model_dump(exclude_none=True)  # half is None
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[name] = str(value)
    return json.dumps(values, allow_nan=False) + "\n"


def _parse(line: str) -> StepRecord | None:
    try:
        return StepRecord.model_validate_json(line)
    except ValueError:
        return None


def _unwritable(path: Path, error: OSError) -> ConfigError:
    read_only = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    reason = "it is read-only for you" if read_only else error.strerror
    return ConfigError(f"{path} cannot be written to: {reason}.", "Give an --output that you can write to.")


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there already."""
    return next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())


def _names(folder: Path) -> list[str]:
    """What is in `folder` besides the lock, which is left behind by a run that never began."""
    names = (path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    return sorted(name for name in names if name != LOCK)


def _contents(path: Path) -> str:
    if not path.is_dir():
        return "it is a file" if path.exists() else "there is no such folder"
    names = _names(path)
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more if names else "it is empty"


def _which_run(path: Path) -> str:
    """The runs in, beside and above `path`: who asks for one often names its parent or its adapter."""
    if RunFolder(path.parent)._holds_run():
        return f"Give the run itself: {path.parent}"
    for folder in (path, path.parent):
        items = sorted(folder.iterdir()) if folder.is_dir() else []
        runs = [str(item) for item in items if RunFolder(item)._holds_run()]
        if runs:
            return "Give one of these: " + ", ".join(runs[:SHOWN_NAMES])
    return "Give the folder that a training run wrote, such as runs/NAME."


def _leaf(name: str) -> str:
    """The last part of a path or of a hub's name, with the characters that every file system takes."""
    parts = [part for part in re.split(r"[\\/]", name) if part]
    leaf = parts[-1] if parts else ""
    if leaf in (".", ".."):
        leaf = Path(name).resolve().name
    return re.sub(r"[^\w.-]+", "-", leaf).strip("-.")


def _without_endings(name: str) -> str:
    """`train.jsonl.gz` as `train`. Only known endings go: squad-v1.1 is a name."""
    while (cut := Path(name)).suffix.lower() in _DATA_ENDINGS:
        name = cut.stem
    return name
