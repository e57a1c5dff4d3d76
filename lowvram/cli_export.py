"""`lowvram export`: a trained adapter for llama.cpp, LM Studio, Ollama, vLLM and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lowvram import cli_flags


def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or an adapter folder.")],
    to: Annotated[
        str,
        typer.Option("--to", help="gguf, lora-gguf (the adapter alone), ollama, vllm or adapter (to share)."),
    ],
    type_name: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="f32, f16, bf16, q8_0, q6_k, q5_k_m or q4_k_m (default: f16; ollama q8_0, an adapter f32).",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Default: RUN/model-TYPE.gguf, RUN/adapter.gguf or RUN/ollama."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, if it moved since the training.")] = None,
    quantizer: Annotated[
        Path | None,
        typer.Option(help="llama.cpp's llama-quantize (default: xllamacpp, else the one on PATH)."),
    ] = None,
    ollama_base: Annotated[
        str | None,
        typer.Option(help="Ollama's name of the base, such as llama3.1:8b: the adapter is put on it."),
    ] = None,
    push: cli_flags.Push = None,
    public: cli_flags.Public = False,
    check: Annotated[
        bool, typer.Option("--check", help="Load the file with llama.cpp (xllamacpp) before it is kept.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Refuse what would be refused, and write nothing.")
    ] = False,
) -> None:
    """Write the model as GGUF (merged on the way, or the adapter alone), for Ollama, for vLLM or to share."""
    from lowvram.export_command import export_run, require_exportable
    from lowvram.export_request import Export
    from lowvram.shell import command_line

    asked = Export(
        run, to, type_name, output, base, quantizer, ollama_base, push, public, check, command_line()
    )
    if dry_run:
        require_exportable(asked)
    else:
        export_run(asked, Console(highlight=False))
