"""AnswerFile: answers on disk as soon as they are there, and at the end one whole file of them in order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from lowvram.errors import ConfigError, refusals_of_the_system
from lowvram.export.partial_folder import one_writer
from lowvram.frozen import require_new_file

_START = b'{"row": '
_GO_ON = "type the same command again: it goes on from there."


class AnswerFile:
    """`path` appears when all rows are answered; until then PATH.partial has those that are.

    Rows are answered by their length, so that they come in no order: the first line there says what was
    asked, the second in which precision the base is, each other one begins with its row's number. Memory
    takes a row's place in the file only.
    """

    def __init__(self, path: Path, partial: IO[bytes], places: dict[int, int]) -> None:
        self._path, self._partial, self._places = path, partial, places
        self._is_whole = False

    @classmethod
    @contextmanager
    def open(cls, path: Path, asked: str) -> Iterator[AnswerFile]:
        """Go on with what an earlier process that was asked the same has left.

        Args:
            asked: stands for all that the answers follow from.

        Raises:
            ConfigError: `path` is there or cannot be made, another process makes it now, or PATH.partial
                keeps answers of another command.
        """
        require_new_file(path)
        partial = partial_of(path)
        with ExitStack() as opened:
            with refusals_of_the_system(f"'{path}' cannot be written", "Give another --output."):
                opened.enter_context(one_writer(path))
                handle = opened.enter_context(partial.open("a+b"))
                file = cls(path, handle, _places(handle, partial, asked))
            try:
                yield file
            finally:
                with suppress(OSError):  # a full disk again; what `add` took is there
                    handle.close()
                if file._is_whole or not file._places:
                    partial.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, number: object) -> bool:
        return number in self._places

    @property
    def where(self) -> str:
        """Where the answers are that would be lost otherwise."""
        return f", in '{partial_of(self._path)}'" if self._places else ""

    def computed_in(self, precision: str) -> None:
        """Answers of one precision only; which one it is follows from the memory that is free.

        Raises:
            ConfigError: those that are there were computed in another.
        """
        partial = partial_of(self._path)
        line = json.dumps({"base_precision": precision}).encode() + b"\n"
        with refusals_of_the_system(f"'{partial}' cannot be written", "Give another --output."):
            self._partial.seek(0)
            self._partial.readline()  # what was asked
            if not self._places:
                self._partial.truncate()
                self._partial.write(line)
                return
            found = self._partial.readline()
        if found != line:
            kept = json.loads(found).get("base_precision")
            raise ConfigError(
                f"'{partial}' keeps {len(self)} answers of a base in {kept}; now {precision} is planned.",
                f"Add --precision {kept} to go on with them, or give another --output.",
            )

    def add(self, number: int, line: str) -> None:
        """One row's JSON object.

        Raises:
            DoesNotFitError, ConfigError: it cannot be written; all before it are.
        """
        with refusals_of_the_system(
            f"'{partial_of(self._path)}' cannot be written; it keeps {len(self)} answers",
            f"Put that right, then {_GO_ON}",
        ):
            place = self._partial.seek(0, os.SEEK_END)
            self._partial.write(_START + f"{number}, ".encode() + line.encode()[1:])
            self._partial.flush()
        self._places[number] = place

    def finish(self) -> None:
        """All rows are there: the whole file, in their order.

        Raises:
            ConfigError: something has come to be at its place, or it cannot be written.
        """
        kept = f"the {len(self)} answers are in '{partial_of(self._path)}'"
        if os.path.lexists(self._path):  # once more: answering takes a while
            raise ConfigError(
                f"'{self._path}' has come to be meanwhile; {kept}.", f"Move it away, then {_GO_ON}"
            )
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with refusals_of_the_system(
            f"'{self._path}' cannot be written; {kept}", f"Put that right, then {_GO_ON}"
        ):
            try:
                self._copy_to(temporary)
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)
        self._is_whole = True

    def _copy_to(self, temporary: Path) -> None:
        with temporary.open("wb") as whole:
            for _, place in sorted(self._places.items()):
                self._partial.seek(place)
                whole.write(b"{" + self._partial.readline().partition(b", ")[2])
            whole.flush()
            os.fsync(whole.fileno())


def partial_of(path: Path) -> Path:
    """Where the answers are until all are there."""
    return path.with_name(f"{path.name}.partial")


def _places(handle: IO[bytes], partial: Path, asked: str) -> dict[int, int]:
    """Row's number -> where its line begins; a line that a kill cut short goes."""
    header = json.dumps({"asked": asked}).encode() + b"\n"
    handle.seek(0)
    first = handle.readline()
    if first != header:
        if not header.startswith(first):
            raise ConfigError(
                f"'{partial}' keeps answers of another command, or to other rows.",
                "Type that command again to go on with it, remove the file, or give another --output.",
            )
        handle.truncate(0)
        handle.write(header)
        return {}
    places, end = {}, handle.tell()
    while (line := handle.readline()).endswith(b"\n"):
        if (number := _number(line)) is not None:
            places[number] = end
        end = handle.tell()
    handle.truncate(end)
    return places


def _number(line: bytes) -> int | None:
    """Of the row; None where the line is none of ours."""
    try:
        number = json.loads(line)["row"]
    except (ValueError, KeyError, TypeError):
        return None
    return number if isinstance(number, int) and line.startswith(_START) else None
