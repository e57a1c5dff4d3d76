"""The command line: parses, calls one stage, prints; the only place that catches our errors."""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from lowvram import (
    __version__,
    cli_data,
    cli_export,
    cli_flags,
    cli_merge,
    cli_profiles,
    cli_requests,
    cli_use,
    cli_watch,
)
from lowvram.alloc_conf import set_alloc_conf
from lowvram.errors import LowvramError
from lowvram.screen import optional_screen
from lowvram.shell import command_line, typed
from lowvram.units import printable

if TYPE_CHECKING:
    from lowvram.planning import Planned

app = typer.Typer(
    name="lowvram",
    help="Fine-tune the largest model your GPU can hold, and know before you start.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_profiles.app, name="profiles")


def _console(stderr: bool = False) -> Console:
    return Console(highlight=False, stderr=stderr)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"lowvram {__version__}")
        raise typer.Exit


@app.command()
def probe(as_json: cli_flags.AsJson = False) -> None:
    """Show what this machine has, what is missing and how to get it."""
    from lowvram import hardware, probe_view

    found = hardware.probe()
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        probe_view.show(found, _console())


@app.command()
def plan(
    model: cli_flags.Models,
    data: cli_flags.MaybeData = None,
    data_format: cli_flags.DataFormat = None,
    fields: cli_flags.Fields = None,
    split: cli_flags.Split = None,
    skip_bad: cli_flags.SkipBad = False,
    eval_data: cli_flags.EvalData = None,
    vram: cli_flags.Vram = None,
    rank: cli_flags.Rank = None,
    alpha: cli_flags.Alpha = None,
    dropout: cli_flags.Dropout = None,
    targets: cli_flags.Targets = None,
    seq_len: cli_flags.SeqLen = None,
    batch: cli_flags.BatchSize = None,
    precision: cli_flags.Precision = None,
    optimizer: cli_flags.Optimizer = None,
    micro_batch: cli_flags.MicroBatch = None,
    packing: cli_flags.Packing = None,
    rslora: cli_flags.RsLora = None,
    bias: cli_flags.Bias = None,
    init: cli_flags.Init = None,
    init_batches: cli_flags.InitBatches = None,
    dora: cli_flags.Dora = None,
    lora_plus: cli_flags.LoraPlus = None,
    lora_fa: cli_flags.LoraFa = None,
    inference_mode: cli_flags.InferenceMode = False,
    no_offload: cli_flags.NoOffload = False,
    prefer: cli_flags.Preference = None,
    levers: cli_flags.LeverText = "default",
    profile: cli_flags.ProfileName = None,
    seed: cli_flags.Seed = 0,
    epochs: cli_flags.Epochs = None,
    steps: cli_flags.Steps = None,
    learning_rate: cli_flags.LearningRate = None,
    early_stop: cli_flags.EarlyStop = None,
    keep_checkpoints: cli_flags.KeepCheckpoints = None,
    trust_remote_code: cli_flags.Remote = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the plan as YAML.")] = None,
    html: Annotated[Path | None, typer.Option(help="Save the plan as a page for a browser.")] = None,
    why: Annotated[bool, typer.Option("--why", help="Say of each lever why it is so.")] = False,
    as_json: cli_flags.AsJson = False,
) -> None:
    """Predict what training would need: no GPU, no weights. Exit code 3 when it does not fit."""
    from lowvram.frozen import require_new_file

    flags = dict(locals())
    files = {flag: path for flag, path in (("--output", output), ("--html", html)) if path is not None}
    for flag, path in files.items():
        require_new_file(path, flag)
    from lowvram import compare_view

    compare_view.require_comparable(model, files)
    if len(model) > 1:
        cli_requests.compare(flags, as_json)
        return
    try:
        planned = cli_requests.planned({**flags, "model": model[0]}, with_survey=True, with_why=why)
    except LowvramError as error:
        if as_json and error.exit_code == 3:
            typer.echo(json.dumps(compare_view.Column(model[0], error).as_json()))
        raise
    _show(planned, as_json)
    _save(planned, files, _console(stderr=as_json))


@app.command()
def auto(
    model: cli_flags.Model,
    data: cli_flags.Data,
    data_format: cli_flags.DataFormat = None,
    fields: cli_flags.Fields = None,
    split: cli_flags.Split = None,
    skip_bad: cli_flags.SkipBad = False,
    eval_data: cli_flags.EvalData = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the plan.")] = False,
    vram: cli_flags.Vram = None,
    rank: cli_flags.Rank = None,
    alpha: cli_flags.Alpha = None,
    dropout: cli_flags.Dropout = None,
    targets: cli_flags.Targets = None,
    seq_len: cli_flags.SeqLen = None,
    batch: cli_flags.BatchSize = None,
    precision: cli_flags.Precision = None,
    optimizer: cli_flags.Optimizer = None,
    micro_batch: cli_flags.MicroBatch = None,
    packing: cli_flags.Packing = None,
    rslora: cli_flags.RsLora = None,
    bias: cli_flags.Bias = None,
    init: cli_flags.Init = None,
    init_batches: cli_flags.InitBatches = None,
    dora: cli_flags.Dora = None,
    lora_plus: cli_flags.LoraPlus = None,
    lora_fa: cli_flags.LoraFa = None,
    inference_mode: cli_flags.InferenceMode = False,
    no_offload: cli_flags.NoOffload = False,
    prefer: cli_flags.Preference = None,
    levers: cli_flags.LeverText = "default",
    profile: cli_flags.ProfileName = None,
    seed: cli_flags.Seed = 0,
    epochs: cli_flags.Epochs = None,
    steps: cli_flags.Steps = None,
    learning_rate: cli_flags.LearningRate = None,
    early_stop: cli_flags.EarlyStop = None,
    keep_checkpoints: cli_flags.KeepCheckpoints = None,
    trust_remote_code: cli_flags.Remote = False,
    log_with: cli_flags.LogWith = None,
    output: cli_flags.Output = None,
    as_json: cli_flags.AsJson = False,
) -> None:
    """Probe, check the data, plan, train, save the adapter."""
    flags = dict(locals())
    with optional_screen(stdout=not as_json):  # the one object on it is what --json asks for
        if dry_run:
            _show(cli_requests.planned(flags), as_json)
            return
        from lowvram import pipeline
        from lowvram.engine.source import ModelSource
        from lowvram.training.run_folder import default_path

        cli_requests.hide_loading_bars()
        folder = output or default_path(Path("runs"), model, data)
        if vram is not None:
            pipeline.require_here(
                cli_requests.hardware_of(vram),
                "Add --dry-run to see the plan only, or leave --vram out to plan for this machine.",
            )
        pipeline.preflight(ModelSource(model, trust_remote_code), folder, log_with or (), inference_mode)
        planned = cli_requests.planned(flags)
        console = _console(stderr=as_json)  # with --json, stdout holds the one object and nothing else
        _show(planned, False, console)
        result = pipeline.start(planned, folder, console, log_with or ())
        _show_result(result, folder, as_json)


@app.command()
@optional_screen()
def train(
    plan_file: Annotated[Path, typer.Argument(help="A plan saved by lowvram plan --output.")],
    log_with: cli_flags.LogWith = None,
    output: cli_flags.Output = None,
) -> None:
    """Run a saved plan unchanged."""
    from lowvram import pipeline
    from lowvram.planner.plan import Plan
    from lowvram.training.run_folder import RunFolder, default_path

    cli_requests.hide_loading_bars()
    if output is not None:
        RunFolder.refuse_used(output)
    saved = Plan.from_yaml(plan_file)
    planned = pipeline.checked(pipeline.from_saved(saved, command_line()))
    _show(planned, False)
    folder = output or default_path(Path("runs"), saved.model, str(saved.data))
    result = pipeline.start(planned, folder, _console(), log_with or ())
    _show_result(result, folder, False)


@app.command()
@optional_screen()
def resume(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    force: Annotated[
        bool, typer.Option("--force", help="Go on with a changed plan or data, or without checkpoints.")
    ] = False,
    planned_levers: Annotated[
        bool, typer.Option("--planned-levers", help="Go back up all rungs taken when memory ran out.")
    ] = False,
    log_with: cli_flags.LogWith = None,
) -> None:
    """Continue an interrupted run from its newest whole checkpoint."""
    from lowvram import pipeline

    _require_writable(run)
    cli_requests.hide_loading_bars()
    result = pipeline.resume(run, _console(), log_with or (), force=force, planned_levers=planned_levers)
    _show_result(result, run, False)


app.command()(cli_watch.watch)
app.command()(cli_use.chat)
app.command()(cli_use.generate)
app.command()(cli_merge.merge)
app.command()(cli_export.export)


@app.command()
@optional_screen()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("runs/demo"),
    steps: cli_flags.Steps = None,
) -> None:
    """The whole pipeline on a small real model and a bundled data set: no account, no GPU, minutes."""
    from lowvram.demo.run import run_demo

    cli_requests.hide_loading_bars()
    run_demo(output, steps, _console())


def _require_writable(run: Path) -> None:
    """The run folder's own refusal advises another --output, which a run that goes on cannot have."""
    from lowvram.errors import ConfigError

    if run.is_dir() and not os.access(run, os.W_OK):
        raise ConfigError(
            f"{run} cannot be written to: it is read-only for you.",
            f"Copy it to a folder of yours, then: lowvram resume {typed(f'COPY/{run.resolve().name}')}",
        )


def _show(planned: Planned, as_json: bool, console: Console | None = None) -> None:
    from lowvram import plan_view, survey_view, why_view

    if as_json:
        around = survey_view.survey_json(planned) | why_view.why_json(planned.why)
        typer.echo(json.dumps(plan_view.plan_json(planned.plan) | around, indent=2))
        return
    console = console or _console()
    plan_view.show_plan(planned.plan, console)
    if planned.survey is not None:
        survey_view.show_survey(planned, console)
    if planned.why is not None:
        why_view.show_why(planned.why, console)


def _save(planned: Planned, files: dict[str, Path], console: Console) -> None:
    from lowvram import plan_page
    from lowvram.errors import refusals_of_the_system
    from lowvram.frozen import require_new_file, write_atomically

    told = {"--output": "Saved. Run it with: lowvram train", "--html": "Saved. Open it in a browser:"}
    for flag, path in files.items():
        require_new_file(path, flag)  # once more: planning takes a while
        text = planned.plan.to_yaml() if flag == "--output" else plan_page.page(planned)
        with refusals_of_the_system(f"'{path}' cannot be written", f"Give another {flag}."):
            write_atomically(path, text)
        console.print(f"{told[flag]} {escape(typed(path))}")


def _show_result(result: Any, folder: Path, as_json: bool) -> None:
    from lowvram import result_view

    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        result_view.show_result(result, folder, _console())


def main() -> None:
    """Entry point: our errors become one message, its remedy and their exit code."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # speaks when imported
    set_alloc_conf()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries; what came of them is in our message
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # it logs what it raises as well
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|bitsandbytes")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a plan with a ? for a bar is better than none
    try:
        _run()
    except KeyboardInterrupt:  # before or while an error is told
        sys.exit(130)
    finally:
        if "triton" not in sys.modules:  # which prints 40 lines of "leaked" about what is not collected
            gc.freeze()  # the last collection would walk a million objects of torch: a second for nothing


def _run() -> None:
    try:
        app()
    except LowvramError as error:
        with suppress(LowvramError):  # of a full disk behind stderr: nobody can be told
            _tell(error)
        sys.exit(error.exit_code)


@optional_screen()
def _tell(error: LowvramError) -> None:
    """Message and remedy on stderr, whole: a second Ctrl-C does not cut them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    console = _console(stderr=True)
    head = "Stopped" if error.exit_code > 128 else "Error"
    console.print(f"[bold red]{head}:[/] {escape(printable(error.message))}", soft_wrap=True)
    if error.remedy:
        console.print(f"[bold]What to do:[/] {escape(printable(error.remedy))}", soft_wrap=True)
