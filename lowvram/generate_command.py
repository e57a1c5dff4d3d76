"""`lowvram generate`: prompts or a file of rows in, one JSON line a row out, several rows at one time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lowvram.answering import Found, Loaded, load, memory_errors, planned
from lowvram.data.conversations import Message, string_of, turns_of
from lowvram.data.prompting import prompt_ids
from lowvram.data.sources import read_rows
from lowvram.engine.generate import Answer
from lowvram.engine.sampling import Sampling
from lowvram.errors import ConfigError, DataError, StoppedError, refusals_of_the_system
from lowvram.frozen import require_new_file, write_atomically
from lowvram.hardware import Hardware
from lowvram.memory.cache import RememberedModel
from lowvram.training.signals import Interrupted, stop_on_signal

Write = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """One row: what is shown of it, its `id` included, and the token ids of its prompt."""

    where: str
    shown: dict[str, Any]
    ids: list[int]


@dataclass(frozen=True)
class Settings:
    """How rows are answered."""

    sampling: Sampling
    max_new_tokens: int
    batch: int | None = None
    precision: str | None = None


def asked(prompts: Sequence[str], file: str | None, system: str, tokenizer: Any) -> list[Asked]:
    """All prompts, then all rows of the file, each with `prompt` or `messages`.

    Args:
        system: the system prompt of rows that bring none.

    Raises:
        ConfigError: nothing is asked.
        DataError: the first row that cannot be answered, by file and line.
    """
    rows = [(f"prompt {i}", {"prompt": prompt}) for i, prompt in enumerate(prompts, 1)]
    rows += list(read_rows(file)) if file is not None else []
    if not rows:
        raise ConfigError("Nothing is asked.", 'Give -p "a prompt", or --input FILE.jsonl.')
    return [_asked(where, row, system, tokenizer) for where, row in rows]


def _asked(where: str, row: dict[str, Any], system: str, tokenizer: Any) -> Asked:
    if ("messages" in row) == ("prompt" in row):
        raise DataError(
            f"{where}: a row needs either 'prompt' or 'messages'; its fields are {', '.join(row) or 'none'}.",
            'Write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}.',
        )
    field = "messages" if "messages" in row else "prompt"
    if field == "messages":
        turns = turns_of(where, row, field)
    else:
        turns = [Message(role="user", content=string_of(where, row, field))]
    if turns[-1].role == "assistant":
        raise DataError(
            f"{where}: the last turn is the assistant's, so nothing is asked.", "End with the user's turn."
        )
    if system and turns[0].role != "system":
        turns = [Message(role="system", content=system), *turns]
    shown = {name: row[name] for name in ("id", field) if name in row}
    return Asked(where, shown, prompt_ids(turns, tokenizer, where))


def generate(
    found: Found,
    rows: Sequence[Asked],
    hardware: Hardware,
    settings: Settings,
    write: Write,
    console: Console,
) -> None:
    """Answer all rows, the longest first, and write them in their own order.

    Args:
        write: takes each line as soon as it and all before it are there.
        console: for the plan and a progress bar.

    Raises:
        DataError: a prompt that is too long for the model.
        DoesNotFitError: even one row at a time needs more than the budget.
        StoppedError: a signal came.
    """
    context = _context(found, rows, settings.max_new_tokens)
    with console.status("planning"):
        plan = planned(
            found,
            hardware,
            precision=settings.precision,
            context=context,
            batch=settings.batch and min(settings.batch, len(rows)),
            rows=len(rows),
        )
    for note in (plan.summary, *found.notes):
        console.print(note, style="dim", markup=False, soft_wrap=True)
    try:
        with stop_on_signal(lambda _: None):
            _answer_all(load(found, plan, hardware), rows, settings, write, console)
    except Interrupted as interrupt:
        raise StoppedError(
            "Generating was stopped before all rows were answered.",
            "Start it again.",
            interrupt.signal_number,
        ) from interrupt


def _context(found: Found, rows: Sequence[Asked], max_new_tokens: int) -> int:
    """The longest prompt and its answer."""
    limit = RememberedModel(found.source).shape.context_limit
    longest = max(rows, key=lambda row: len(row.ids))
    context = len(longest.ids) + max_new_tokens
    if context > limit:
        raise DataError(
            f"{longest.where}: {len(longest.ids):,} tokens of prompt and {max_new_tokens:,} of answer are "
            f"more than the {limit:,} positions that the model knows.",
            "Shorten the prompt, or give a smaller --max-new-tokens.",
        )
    return context


def _answer_all(
    loaded: Loaded, rows: Sequence[Asked], settings: Settings, write: Write, console: Console
) -> None:
    answers: dict[int, Answer] = {}
    n_written = 0
    with _progress(console) as bar, memory_errors(loaded.plan):
        task = bar.add_task("answering", total=len(rows))
        for numbers in _batches(rows, loaded.plan.batch):
            prompts = [rows[i].ids for i in numbers]
            given = loaded.answers.to(prompts, settings.max_new_tokens, settings.sampling, numbers)
            answers |= dict(zip(numbers, given, strict=True))
            bar.advance(task, len(numbers))
            while n_written in answers:
                write(_line(rows[n_written], answers.pop(n_written)))
                n_written += 1


def _batches(rows: Sequence[Asked], size: int) -> Iterator[list[int]]:
    """Numbers of rows of like length, the longest first: if memory does not suffice, it shows at once."""
    by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    for start in range(0, len(rows), size):
        yield by_length[start : start + size]


def _line(row: Asked, answer: Answer) -> str:
    told = row.shown | {"answer": answer.text, "stopped": answer.stopped, "n_tokens": answer.n_tokens}
    return json.dumps(told, ensure_ascii=False, default=str) + "\n"  # a table's id may be a date


def _progress(console: Console) -> Progress:
    columns = TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console)


class WholeFile:
    """Lines of a file that appears when all are there, and replaces none."""

    def __init__(self, path: Path) -> None:
        """Raises: ConfigError, if something is there already or nothing can be written there."""
        require_new_file(path)
        self._path, self._lines = path, list[str]()

    def write(self, line: str) -> None:
        self._lines.append(line)

    def finish(self) -> None:
        require_new_file(self._path)  # once more: answering takes a while
        with refusals_of_the_system(f"'{self._path}' cannot be written", "Give another --output."):
            write_atomically(self._path, "".join(self._lines))
