"""`lowvram watch`: a run on the screen of another terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def watch(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    once: Annotated[bool, typer.Option("--once", help="Show how it stands now, and end.")] = False,
) -> None:
    """Follow a run that trains in another terminal; only reads its folder."""
    from lowvram import watch as watching

    watching.watch(run, Console(highlight=False), once)
