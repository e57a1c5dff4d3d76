"""Shows a chat: in a terminal as it is written, side by side where two answer, plainly where nobody looks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import suppress

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lowvram.engine.generate import AnswerStream
from lowvram.errors import LowvramError
from lowvram.units import printable


class ChatView:
    """Reads lines from stdin and writes answers to stdout; all else goes to stderr where stdin is a pipe."""

    def __init__(self, console: Console, notes: Console) -> None:
        self.interactive = sys.stdin.isatty()
        if self.interactive:
            with suppress(ImportError):  # on Windows, whose terminal does the same by itself
                importlib.import_module("readline")  # gives `input` its arrow keys
        self._console = console
        self._notes = console if self.interactive else notes

    def lines(self) -> Iterator[str]:
        """What is typed, until Ctrl-D or the end of the file. Ctrl-C on an empty line says how to leave."""
        while True:
            try:
                yield input("> " if self.interactive else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.note("Ctrl-D or /quit leaves")

    def note(self, text: str) -> None:
        self._notes.print(f"[dim]{escape(printable(text))}[/]", soft_wrap=True)

    def refuse(self, error: LowvramError) -> None:
        """As the command line does it, but the chat goes on."""
        self._notes.print(f"[red]{escape(printable(error.message))}[/]", soft_wrap=True)
        self.note(error.remedy)

    def help(self, commands: dict[str, str]) -> None:
        width = max(map(len, commands))
        for command, meaning in commands.items():
            self._notes.print(f"  {escape(command):{width}}  [dim]{escape(meaning)}[/]")

    def answer(self, name: str, stream: AnswerStream) -> None:
        """Piece by piece; whose it is stands before it where somebody looks."""
        if self.interactive:
            self._console.print(f"[green]{escape(name)}[/]")
        try:
            for piece in stream:
                self._console.file.write(printable(piece))  # rich would look for markup and break lines
                self._console.file.flush()
        finally:
            self._console.file.write("\n")
            self._console.file.flush()

    def side_by_side(self, streams: Iterator[tuple[str, AnswerStream]]) -> None:
        """Two columns that fill one after the other; a pipe gets them when they are whole."""
        texts: dict[str, Text] = {}
        with Live(console=self._console, auto_refresh=False, vertical_overflow="visible") as live:
            for name, stream in streams:
                texts[name] = Text()
                for piece in stream:
                    texts[name].append(printable(piece))
                    live.update(_columns(texts), refresh=self.interactive)
                live.update(_columns(texts))


def _columns(texts: dict[str, Text]) -> Table:
    table = Table(expand=True, show_edge=False, pad_edge=False)
    for name in texts:
        table.add_column(escape(name), ratio=1, overflow="fold")
    table.add_row(*texts.values())
    return table
