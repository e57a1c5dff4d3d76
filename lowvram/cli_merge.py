"""`lowvram merge` on the command line."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lowvram import cli_flags, cli_requests


class Onto(str, Enum):
    """Values of --onto."""

    base = "base"
    nf4 = "nf4"
    int8 = "int8"


class Dtype(str, Enum):
    """Values of --dtype."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


def merge(
    run: Annotated[Path, typer.Argument(help="A run folder, or an adapter folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: RUN/merged, in 4 bits RUN/merged-4bit.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, if it moved since the training.")] = None,
    onto: Annotated[
        Onto, typer.Option(help="The original weights, or the quantised values that the adapter trained on.")
    ] = Onto.base,
    quantized_base: Annotated[
        bool, typer.Option("--quantized-base", help="Write 4-bit weights; says what that costs.")
    ] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the merged weights. Default: the base's.")] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Largest weight file. Default: 4GB, in 4 bits 256MB.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare merged model and adapter on held-out rows.")
    ] = True,
    data: Annotated[
        str | None, typer.Option(help="Rows to verify with, instead of the run's held-out ones.")
    ] = None,
    push: cli_flags.Push = None,
    public: cli_flags.Public = False,
) -> None:
    """Merge the adapter into the original 16-bit weights, in bounded memory, and verify the result."""
    from lowvram import merge_command
    from lowvram.shell import command_line
    from lowvram.units import parse_bytes

    wishes = merge_command.MergeWishes(
        onto=onto.value,
        quantized_base=quantized_base,
        dtype=dtype.value if dtype else None,
        shard_bytes=parse_bytes(shard_size) if shard_size is not None else None,
        verify=verify,
        data=data,
        push=push,
        public=public,
    )
    cli_requests.hide_loading_bars()
    merge_command.merge_run(run, output, Console(highlight=False), base, wishes, command_line())
