"""`lowvram data`: looks at training data before it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lowvram import cli_flags

if TYPE_CHECKING:
    from lowvram.data.shapes import Reading

app = typer.Typer(help="Look at training data before it is trained on.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Keeps `check` a command of its own, for typer makes a single one the whole."""


@app.command("check")
def data_check(
    data: Annotated[str, typer.Argument(help="JSONL, JSON, CSV, parquet, or a data set's id or folder.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Count tokens with its tokenizer.")
    ] = None,
    data_format: cli_flags.DataFormat = None,
    fields: cli_flags.Fields = None,
    split: cli_flags.Split = None,
    skip_bad: cli_flags.SkipBad = False,
    seq_len: Annotated[int | None, typer.Option(min=8, help="What is cut at so many tokens.")] = None,
    html: Annotated[Path | None, typer.Option(help="Save a page with lengths and examples.")] = None,
    as_json: cli_flags.AsJson = False,
) -> None:
    """Show format, counts, lengths, bad rows, and the first example as the model sees it."""
    from lowvram import data_view

    reading = reading_of(dict(locals()))
    data_view.check(
        data, model, Console(highlight=False), reading=reading, seq_len=seq_len, html=html, as_json=as_json
    )


def reading_of(flags: dict[str, Any]) -> Reading:
    """How the data is read.

    Raises:
        ConfigError: flags about data without data, or that contradict each other.
    """
    from lowvram.data.shapes import Reading, reading_from
    from lowvram.errors import ConfigError

    reading = reading_from(flags["data_format"], flags["fields"], flags["split"], flags["skip_bad"])
    if flags["data"] is None and flags.get("eval_data") is not None:
        raise ConfigError("--eval-data is held out beside data that trains.", "Give that too: --data FILE.")
    if flags["data"] is None and reading != Reading():
        raise ConfigError("There is no data to read in that way.", "Give it: --data FILE.")
    return reading
