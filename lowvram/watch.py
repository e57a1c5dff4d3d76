"""`lowvram watch`: follows a run's files from another terminal, reads only, and says how the run stands."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel
from rich.console import Console

from lowvram.errors import ConfigError, refusals_of_the_system
from lowvram.result_view import show_result
from lowvram.shell import typed
from lowvram.training.events import Event
from lowvram.training.live import make_view
from lowvram.training.metrics import StepRecord
from lowvram.training.result import RunResult
from lowvram.training.run_folder import RunFolder

POLL_SECONDS = 0.5
SHOWN_EVENTS = 5  # of those before the watching began
Line = TypeVar("Line", bound=BaseModel)


def watch(
    path: Path, console: Console, once: bool = False, pause: Callable[[float], None] = time.sleep
) -> None:
    """Show the run in `path` until it is finished or Ctrl-C is pressed; `once`: as it is now.

    Raises:
        ConfigError: there is no run, it vanishes, or it cannot be read.
    """
    with refusals_of_the_system(f"{path} cannot be read", "Ask its owner to let you read it."):
        result = _followed(_Watching(RunFolder.open(path), console), once, pause)
    if result is not None:
        show_result(result, path, console)


def _followed(watching: _Watching, once: bool, pause: Callable[[float], None]) -> RunResult | None:
    """The result of the run when it ends before the watching does."""
    result: RunResult | None = None
    try:
        result = watching.look()
        while result is None and not once:
            pause(POLL_SECONDS)
            result = watching.look()
    except KeyboardInterrupt:  # the usual way to leave; the run goes on
        pass
    finally:
        watching.end()
    return result


class Tail(Generic[Line]):
    """New lines of a file that another process writes, as far as they are whole."""

    def __init__(self, file: Path, kind: type[Line]) -> None:
        self._file, self._kind = file, kind
        self._offset = 0
        self._last = b""  # the line before the offset; another one there: the file was written anew

    def new_lines(self) -> tuple[list[Line], bool]:
        """What came since the last call; True: the file was cut, and these are all that it has now.

        The file is open for a moment only: Windows lets nobody replace a file that another one has open.
        """
        try:
            with self._file.open("rb") as handle:
                handle.seek(self._offset - len(self._last))
                data = handle.read()
                cut = not data.startswith(self._last)
                if cut:
                    handle.seek(0)
                    data, self._offset, self._last = handle.read(), 0, b""
        except PermissionError:
            if sys.platform != "win32":
                raise
            return [], False  # it is being replaced at this moment
        except FileNotFoundError:
            cut, data = bool(self._offset), b""
            self._offset, self._last = 0, b""
        whole = data[len(self._last) : data.rfind(b"\n") + 1]  # the last one may be half written
        if whole:
            self._offset += len(whole)
            self._last = whole.splitlines(keepends=True)[-1]
        return [line for line in map(self._parsed, whole.splitlines()) if line is not None], cut

    def _parsed(self, line: bytes) -> Line | None:
        with suppress(ValueError):  # what a power cut left, until a resume takes it away
            return self._kind.model_validate_json(line)
        return None


class _Watching:
    """What is on the screen, and what was last said about the process."""

    def __init__(self, folder: RunFolder, console: Console) -> None:
        self._folder = folder
        self._steps = Tail(folder.metrics_file, StepRecord)
        self._events = Tail(folder.events_file, Event)
        self._view = make_view(console, f"watching {folder.path}")
        self._newest: StepRecord | None = None
        self._began = False
        self._runs: bool | None = None

    def look(self) -> RunResult | None:
        """Show what is new; the run's result when it has ended.

        Raises:
            ConfigError: the folder is no longer there.
        """
        holder = self._folder.holder()  # before the files: a run that ends now is then found finished
        if not self._began:
            self._view.start()
        self._show_events()
        self._show_steps()
        self._require_there()
        self._began = True
        result = self._folder.finished()
        if result is not None and (holder is None or self._folder.receipt_file.is_file()):
            return result
        if self._runs != (holder is not None):
            self._runs = holder is not None
            self._view.note(self._standing(holder))
        return None

    def end(self) -> None:
        self._view.stop()

    def _require_there(self) -> None:
        path = self._folder.path
        if not path.is_dir():
            raise ConfigError(
                f"{path} is gone: it was moved or removed while it was watched.",
                "Where it is now, follow it with: lowvram watch RUN",
            )

    def _show_events(self) -> None:
        events, _ = self._events.new_lines()
        for event in events if self._began else events[-SHOWN_EVENTS:]:
            at = datetime.fromisoformat(event.at).astimezone()
            self._view.note(f"{at:%H:%M} {event.text}")

    def _show_steps(self) -> None:
        records, cut = self._steps.new_lines()
        if cut and self._folder.metrics_file.exists():  # a resume replaces it; it removes nothing
            last = records[-1].step if records else 0
            self._view.note(f"The run was resumed: its newest step is now {last}.")
        if cut or not self._began:
            self._view.catch_up(records)
            self._newest = records[-1] if records else None
            return
        for record in records:
            self._view.step(record)
            self._newest = record

    def _standing(self, holder: str | None) -> str:
        newest = self._newest
        at = f"{newest.step} of {newest.total_steps} steps done" if newest else "no step done yet"
        if holder is not None:
            return f"Running (process {holder}), {at}."
        return f"Not running, {at}. Continue with: lowvram resume {typed(self._folder.path)}"
