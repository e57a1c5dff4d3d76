"""How a path or a name is written into a command that is printed for the user to type."""

from __future__ import annotations

import os
import shlex
import sys


def command_line() -> str:
    """This process's command with all its flags, to be typed again."""
    return " ".join(["lowvram", *map(typed, sys.argv[1:])])


def typed(text: object) -> str:
    """As one word of the shell: quoted where it has blanks or signs that the shell would take for its own."""
    word = str(text)
    if os.name != "nt":
        return shlex.quote(word)
    return word if word and not set(word) & set(" \t&()[]{}^=;!'+,`~") else f'"{word}"'
