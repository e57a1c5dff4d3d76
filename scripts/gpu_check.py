"""Checks lowvram's predictions on a GPU: emulated 8 to 24 GB cards, predicted beside measured bytes.

    python scripts/gpu_check.py                        # everything, at most 8 minutes on an H100
    python scripts/gpu_check.py --only cards --cards 8,12 --models qwen2-7b

Models have their published shapes and random weights; nothing is downloaded. Each row lands in
benchmarks/gpu_check.csv as soon as it is measured. Without a GPU the same path is run on the CPU with a tiny
model, against torch's profiler; exit code 1 when that is more than 1 % off. Also 1, here as there, when a
lever's gradients differ from those of the step without it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from gpu_check_rows import Machine, Row, append
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lowvram.alloc_conf import VARIABLE, alloc_conf
from lowvram.errors import LowvramError
from lowvram.gpu_driver import read_driver
from lowvram.hardware import Hardware
from lowvram.units import format_bytes

HERE = Path(__file__).parent
MODELS = ("qwen2-7b", "llama-8b", "13b", "30b")  # by size
CARDS = (8.0, 12.0, 16.0, 24.0)
REFERENCES = ((8.0, "qwen2-7b"), (8.0, "llama-8b"), (12.0, "13b"), (24.0, "30b"))  # what users ask for first
PARTS = ("micro", "levers", "recovery", "tiles", "answers", "cards")
TOLERANCE = 0.01
_STAGES = {  # seconds at most
    "micro": ("kernels", 120.0),
    "levers": ("levers", 90.0),
    "recovery": ("out of memory", 90.0),
    "tiles": ("a long step", 90.0),
    "answers": ("a chat and a batch", 60.0),
}
_WRONG = ("differs", "failed")
_JUDGED = ("parity", "recovery")
_POLL_SECONDS = 0.3
_LEAST_SECONDS = 20.0  # a process that has imported torch has used half of them
_SMALL_SECONDS = 180.0

Pair = tuple[float, str]


@dataclass
class Check:
    """One run of the script: where rows go, what is shown, and when it must end."""

    out: Path
    progress: Progress
    folder: Path
    end: float  # time.monotonic()
    machine: Machine | None = None
    waiting: list[Row] = field(default_factory=list)  # rows of the stage that finds out where we are
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        if self.machine is None:
            self.waiting.append(row)
            return
        append(self.out, self.machine, row)
        self.rows.append(row)

    def found(self, hardware: Hardware) -> None:
        self.machine = Machine.of(hardware)
        for row in self.waiting:
            self.add(row)

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()


def run_stage(
    command: list[str], rows: Path, seconds: float, on_row: Callable[[Row], None], **changed: str
) -> str | None:
    """Run one stage; hand over each row as it comes. None when it ended well, else why it did not.

    Args:
        changed: environment variables.
    """
    environment = {**os.environ, VARIABLE: alloc_conf()} | changed  # as cli.py
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.getenv("PYTHONPATH")])])
    ends, log, n_read = time.monotonic() + seconds, rows.with_suffix(".log"), 0
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None and time.monotonic() < ends:
                time.sleep(_POLL_SECONDS)
                n_read = _hand_over(rows, n_read, on_row)
        finally:
            late = process.poll() is None
            if late:
                process.kill()
            process.wait()
    _hand_over(rows, n_read, on_row)
    if late:
        return f"time limit of {seconds:.0f} s"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
    return f"exit code {process.returncode}: {lines[-1][:300]}" if process.returncode else None


def _hand_over(rows: Path, n_read: int, on_row: Callable[[Row], None]) -> int:
    """New whole lines of the stage's file become rows."""
    text = rows.read_text(encoding="utf-8") if rows.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    for line in lines[n_read:]:
        on_row(Row.model_validate_json(line))
    return len(lines)


def stage(name: str, folder: Path, **options: object) -> tuple[list[str], Path]:
    """The command of a stage and the file into which it writes its rows."""
    about = "-".join(str(options[key]) for key in ("card", "model") if key in options)
    rows = folder / f"{name}-{about}.rows"
    command = [sys.executable, str(HERE / "gpu_check_run.py"), name, "--rows", str(rows)]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    return command, rows


def ordered(cards: Iterable[float], models: Iterable[str]) -> list[Pair]:
    """The most asked-for pairs first, then the others; each from the smallest up."""
    wanted = {(card, model) for card in cards for model in models}
    rest = sorted(wanted - set(REFERENCES), key=lambda pair: (pair[0], MODELS.index(pair[1])))
    return [pair for pair in REFERENCES if pair in wanted] + rest


def on_gpu(given: argparse.Namespace, console: Console) -> int:
    """Every part that was asked for, until the time is up."""
    pairs = ordered(given.cards, given.models) if "cards" in given.only else []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    end = time.monotonic() + 60 * given.total_minutes
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        check = Check(given.out, progress, Path(folder), end)
        stages = {name: _STAGES[name] for name in _STAGES if name in given.only}
        task = progress.add_task("a small step", total=1 + len(stages) + len(pairs))
        hardware = _small(check, given.out)
        if hardware is None:
            return 1
        progress.advance(task)
        plans, pool = _start_plans(check, pairs)
        for name, (description, seconds) in stages.items():
            progress.update(task, description=description)
            command = stage(name, check.folder)
            _report_end(check, Row(check=name), *command, min(seconds, check.seconds_left))
            progress.advance(task)
        for pair in pairs:
            progress.update(task, description=f"{pair[1]} on {pair[0]:g} GB")
            _card(check, pair, plans[pair], 60 * given.minutes)
            progress.advance(task)
        pool.shutdown(cancel_futures=True)
    _summary(check.rows, console)
    console.print(f"{len(check.rows)} rows added to {given.out}")
    return int(any(row.check in _JUDGED and row.outcome in _WRONG for row in check.rows))


def _small(check: Check, out: Path) -> Hardware | None:
    """The stage that all others need: the machine with its measured context."""
    file = check.folder / "hardware.json"
    command, rows = stage("small", check.folder, hardware=file)
    problem = run_stage(command, rows, min(_SMALL_SECONDS, check.seconds_left), check.add)
    if problem or not file.is_file():
        check.progress.console.print(f"[bold red]The small step failed[/]: {problem}", soft_wrap=True)
        return None
    hardware = Hardware.model_validate_json(file.read_bytes())
    check.found(hardware)
    record = check.folder / "snapshot.json"
    if record.is_file():
        out.with_name(f"{out.stem}-snapshot.json").write_bytes(record.read_bytes())
    return hardware


def _start_plans(
    check: Check, pairs: list[Pair]
) -> tuple[dict[Pair, Future[str | None]], ThreadPoolExecutor]:
    """Plan beside the GPU's work, each in a process that does not see the GPU."""
    pool = ThreadPoolExecutor(max_workers=max(1, min(8, (os.cpu_count() or 1) - 2)))

    def plan(pair: Pair) -> str | None:
        if check.seconds_left < _LEAST_SECONDS:
            return "time is up"
        job, hardware = _job_file(check, pair), check.folder / "hardware.json"
        command, rows = stage("plan", check.folder, card=pair[0], model=pair[1], hardware=hardware, job=job)
        hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
        return run_stage(command, rows, check.seconds_left, lambda _: None, **hidden)

    return {pair: pool.submit(plan, pair) for pair in pairs}, pool


def _job_file(check: Check, pair: Pair) -> Path:
    return check.folder / f"{pair[0]:g}-{pair[1]}.job"


def _card(check: Check, pair: Pair, plan: Future[str | None], seconds: float) -> None:
    """One model on one emulated card: its plan's rows, or why there are none."""
    base = Row(check="plan", card_gib=pair[0], model=pair[1])
    problem = plan.result()
    if problem:
        check.add(base.model_copy(update={"outcome": "not planned", "note": problem}))
        return
    _, rows = stage("plan", check.folder, card=pair[0], model=pair[1])
    _hand_over(rows, 0, check.add)  # the planner's refusal, if it refused
    job = _job_file(check, pair)
    if job.is_file():
        command = stage("card", check.folder, card=pair[0], model=pair[1], job=job)
        _report_end(check, base, *command, min(seconds, check.seconds_left))


def _report_end(check: Check, base: Row, command: list[str], rows: Path, seconds: float) -> None:
    """Run a stage; when it ends badly, a row says so."""
    if seconds < _LEAST_SECONDS:
        check.add(base.model_copy(update={"outcome": "not run: time is up"}))
        return
    problem = run_stage(command, rows, seconds, check.add)
    if problem:
        check.add(base.model_copy(update={"check": "stopped", "outcome": "stopped", "note": problem}))


def _summary(rows: list[Row], console: Console) -> None:
    """Measured against predicted, a line for each thing that was predicted."""
    table = Table("check", "card", "model", "tokens", "outcome", "measured", "error", "note", box=None)
    for row in rows:
        if row.phase in (None, "all"):
            measured = row.measured_reserved_bytes or row.measured_bytes
            table.add_row(
                row.check,
                f"{row.card_gib:g} GB" if row.card_gib else "",
                row.model,
                f"{row.seq_len:,}" if row.seq_len else "",
                row.outcome,
                format_bytes(measured) if measured else "",
                f"{100 * row.error:+.2f} %" if row.error is not None else "",
                row.note or "",
            )
    console.print(table)


def on_cpu(console: Console) -> int:
    """The self-check; 1 when a prediction is more than 1 % off or a lever's gradients differ."""
    console.print("There is no NVIDIA GPU here: checking the same path on the CPU with a tiny model.")
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        problem = run_stage(*stage("self-check", Path(folder)), 600.0, found.append)
    if problem or not found:
        console.print(f"[bold red]The self-check failed[/]: {problem}", soft_wrap=True)
        return 1
    parity = [row for row in found if row.gradient_limit is not None or row.outcome in _WRONG]
    wrong = [row for row in parity if row.outcome in _WRONG]
    for row in wrong:
        console.print(
            f"[bold red]{row.outcome}[/]: {row.note}, {row.gradient_error}, {row.gradient_limit} allowed"
        )
    console.print(f"{len(parity) - len(wrong)} of {len(parity)} checks of levers and of recovery passed")
    errors = [_error_said(row, console) for row in found if row.measured_allocated_bytes]
    return int(bool(wrong) or not errors or max(errors) > TOLERANCE)


def _error_said(row: Row, console: Console) -> float:
    """How far the prediction is off, without its sign."""
    predicted, measured = row.predicted_allocated_bytes or 1, row.measured_allocated_bytes or 0
    error = measured / predicted - 1
    console.print(f"predicted {predicted:,} bytes allocated at the peak, torch's profiler saw {measured:,}")
    console.print(f"measured {100 * error:+.2f} % against the prediction; 1 % is allowed")
    return abs(error)


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)

    def some_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
        def parse(text: str) -> tuple[str, ...]:
            names = tuple(part.strip() for part in text.split(","))
            if unknown := [name for name in names if name not in known]:
                raise argparse.ArgumentTypeError(f"{unknown[0]}: use some of {', '.join(known)}")
            return names

        return parse

    def sizes(text: str) -> tuple[float, ...]:
        return tuple(float(part) for part in text.split(","))

    parser.add_argument("--only", type=some_of(PARTS), default=PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--cards", type=sizes, default=CARDS, help="in GB: 8,12,16,24")
    parser.add_argument("--models", type=some_of(MODELS), default=MODELS, help=f"some of {','.join(MODELS)}")
    parser.add_argument("--minutes", type=float, default=1.5, help="at most, for one model on one card")
    parser.add_argument("--total-minutes", type=float, default=8.0, help="at most, for everything")
    parser.add_argument("--out", type=Path, default=HERE.parent / "benchmarks" / "gpu_check.csv")
    return parser.parse_args()


def main() -> int:
    """Exit code 0: done; 1: self-check, first step or a lever failed; 2: wrong arguments or CSV file."""
    given, console = arguments(), Console(highlight=False)
    try:
        return on_gpu(given, console) if read_driver().cards else on_cpu(console)
    except LowvramError as error:
        console.print(f"[bold red]Error:[/] {error.message} {error.remedy}", soft_wrap=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
