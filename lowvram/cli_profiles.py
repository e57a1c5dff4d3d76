"""`lowvram profiles list | show | validate` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lowvram import cli_flags

app = typer.Typer(help="See, copy and check the policies for cards.", no_args_is_help=True)


@app.command("list")
def show_all(as_json: cli_flags.AsJson = False) -> None:
    """Show the profiles that are shipped, and which card takes which."""
    from lowvram import profiles_view

    profiles_view.show_all(as_json, Console(highlight=False))


@app.command("show")
def show(name: Annotated[str, typer.Argument(help="Such as 8gb.")]) -> None:
    """Print a profile as its YAML, comments included: > mine.yaml makes a copy to edit."""
    from lowvram import profiles_view

    typer.echo(profiles_view.content(name), nl=False)


@app.command("validate")
def validate(file: Annotated[Path, typer.Argument(help="A profile of yours.")]) -> None:
    """Name every unknown key and bad value of a profile. Exit code 2 when there are any."""
    from lowvram import profiles_view

    profiles_view.validate(file, Console(highlight=False))
