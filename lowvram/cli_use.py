"""`lowvram chat` and `lowvram generate`: an adapter, its base or a merged model, used at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lowvram import cli_flags

if TYPE_CHECKING:
    from lowvram.engine.sampling import Sampling
    from lowvram.hardware import Hardware

Run = Annotated[str, typer.Argument(help="A run, an adapter, a model's folder (merged or not) or hub id.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="NAME=PATH of a further adapter of the same base; repeatable."),
]
Base = Annotated[str | None, typer.Option(help="Base model, if it moved since the training.")]
Precision = Annotated[
    str | None, typer.Option(help="Of the base: nf4, int8, bf16, fp16 or fp32 (default: as trained).")
]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0: the likeliest answer; higher is more varied.")]
TopP = Annotated[
    float, typer.Option("--top-p", help="Draw from the likeliest tokens that make up this share.")
]
System = Annotated[str, typer.Option(help="System prompt.")]


def chat(
    run: Run,
    adapter: Adapters = None,
    compare: Annotated[bool, typer.Option("--compare", help="Base and adapter answer side by side.")] = False,
    system: System = "",
    context: Annotated[
        int | None,
        typer.Option(min=16, help="Tokens of prompt and answer (default: the run's length, 2048 or more)."),
    ] = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: cli_flags.Seed = 0,
    precision: Precision = None,
    base: Base = None,
    vram: Annotated[
        str | None, typer.Option(help="With --dry-run: for a card of this size, such as 8GB.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and load nothing.")
    ] = False,
    trust_remote_code: cli_flags.Remote = False,
) -> None:
    """Talk to a run's model at once, with and without its adapter. Type /help there."""
    from lowvram import answering
    from lowvram.chat import Chat
    from lowvram.chat_view import ChatView
    from lowvram.errors import ConfigError
    from lowvram.shell import command_line

    if vram is not None and not dry_run:
        raise ConfigError("--vram imagines a card, which cannot answer.", "Add --dry-run, or leave it out.")
    sampling, hardware = _sampling(temperature, top_p, seed), _hardware(vram)
    found = answering.find(
        run, adapter or (), base, trust_remote_code=trust_remote_code, command=command_line()
    )
    if compare and not found.adapters:
        raise ConfigError("--compare: there is no adapter to compare with.", "Add --adapter NAME=PATH.")
    view = ChatView(Console(highlight=False), _errors())
    with _errors().status("planning") as status:
        plan = answering.planned(
            found,
            hardware,
            precision=precision,
            context=context,
            say=lambda text: status.update(escape(text)),
        )
    for note in (plan.summary, *found.notes):
        view.note(note)
    if dry_run:
        return
    with _errors().status("loading"):
        loaded = answering.load(found, plan, hardware)
    view.note(f"answering: {loaded.switch.active}; /help says what you can type")
    Chat(loaded, view, sampling, max_new_tokens, system, compare).run()


def generate(
    run: Run,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeatable.")] = None,
    input_file: Annotated[
        str | None, typer.Option("--input", "-i", help="JSONL; each row has 'prompt' or 'messages'.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL file (default: stdout).")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows at one time (default: as many as fit, up to 32).")
    ] = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: cli_flags.Seed = 0,
    system: System = "",
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="Another adapter of the same base, instead of the run's.")
    ] = None,
    base_only: Annotated[bool, typer.Option("--base-only", help="Without any adapter.")] = False,
    precision: Precision = None,
    base: Base = None,
    trust_remote_code: cli_flags.Remote = False,
) -> None:
    """Answer prompts, one JSON line each: prompt or messages, answer, stopped, n_tokens."""
    from lowvram import answering, generate_command
    from lowvram.answer_file import AnswerFile
    from lowvram.frozen import require_new_file
    from lowvram.shell import command_line

    sampling = _sampling(temperature, top_p, seed)
    if output is not None:
        require_new_file(output)
    found = answering.find(
        run,
        base=base,
        base_only=base_only,
        instead=adapter,
        trust_remote_code=trust_remote_code,
        command=command_line(),
    )
    rows = generate_command.asked(prompt or (), input_file, system, found.tokenizer)
    settings = generate_command.Settings(sampling, max_new_tokens, batch, precision)

    def answer(answered: generate_command.Answered) -> None:
        generate_command.generate(found, rows, _hardware(None), settings, answered, _errors(), command_line())

    if output is None:
        answer(generate_command.InOrder(_to_stdout))
        return
    with AnswerFile.open(output, generate_command.hash_of(found, rows, settings)) as file:
        answer(file)
        file.finish()


def _to_stdout(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


def _errors() -> Console:
    return Console(highlight=False, stderr=True)


def _hardware(vram: str | None) -> Hardware:
    from lowvram import cli_requests

    cli_requests.hide_loading_bars()
    return cli_requests.hardware_of(vram)


def _sampling(temperature: float, top_p: float, seed: int) -> Sampling:
    from pydantic import ValidationError

    from lowvram.engine.sampling import Sampling
    from lowvram.errors import ConfigError

    try:
        return Sampling(temperature=temperature, top_p=top_p, seed=seed)
    except ValidationError as error:
        first = error.errors()[0]
        flag = f"--{str(first['loc'][0]).replace('_', '-')}"
        raise ConfigError(f"{flag} {first['input']}: {first['msg']}.", f"Give another {flag}.") from error
