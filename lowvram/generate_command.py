"""`lowvram generate`: prompts or a file of rows in, one JSON line a row out, several rows at one time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lowvram.answering import Found, Loaded, load, memory_errors, planned
from lowvram.data.conversations import Message, string_of, turns_of
from lowvram.data.prompting import prompt_ids
from lowvram.data.sources import read_rows
from lowvram.engine.adapter_names import CONFIG_FILE, WEIGHTS_FILE
from lowvram.engine.generate import Answer
from lowvram.engine.sampling import Sampling
from lowvram.engine.source import ModelSource, local_shards
from lowvram.errors import ConfigError, DataError, StoppedError
from lowvram.file_hash import file_sha256
from lowvram.hardware import Hardware
from lowvram.memory.cache import RememberedModel
from lowvram.training.signals import Interrupted, stop_on_signal


class Answered(Protocol):
    """Takes each row's line as soon as it is there."""

    @property
    def where(self) -> str:
        """Where its lines are kept if the rest does not follow."""

    def __len__(self) -> int: ...

    def __contains__(self, number: object) -> bool: ...

    def computed_in(self, precision: str) -> None:
        """Hears the base's precision first; refuses to mix answers of two."""

    def add(self, number: int, line: str) -> None: ...


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
    _require_text(where, shown, system)
    return Asked(where, shown, prompt_ids(turns, tokenizer, where))


def _require_text(where: str, shown: dict[str, Any], system: str) -> None:
    """Files are read as text; what is typed, -p and --system, may have bytes that are no UTF-8."""
    try:
        (_json(shown) + system).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: it has {error.object[error.start]!r}, which is no text.", "Type it in UTF-8."
        ) from error


def hash_of(found: Found, rows: Sequence[Asked], settings: Settings) -> str:
    """Of all that the answers follow from and that is known before the plan, which decides the precision.

    How many rows run at one time is none of it.
    """
    sampling = settings.sampling.model_dump_json()
    adapters = [file_sha256(a.folder / name) for a in found.adapters for name in (CONFIG_FILE, WEIGHTS_FILE)]
    source = found.source
    facts = [source.name, source.fingerprint, _stamps(source), settings.max_new_tokens]
    digest = hashlib.sha256(repr([*facts, sampling, adapters]).encode())
    for row in rows:
        digest.update(repr((row.shown, row.ids)).encode("utf-8", "replace"))
    return digest.hexdigest()


def _stamps(source: ModelSource) -> list[tuple[str, int, int]]:
    """Name, size and time of a folder's weights, which are too many bytes for a hash."""
    if not source.is_local:
        return []
    files = local_shards(Path(source.name))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def generate(
    found: Found,
    rows: Sequence[Asked],
    hardware: Hardware,
    settings: Settings,
    answered: Answered,
    console: Console,
    again: str,
) -> None:
    """Answer all rows that are not answered yet, the longest first.

    Args:
        answered: takes the lines, in any order.
        console: for the plan and a progress bar.
        again: what the user typed.

    Raises:
        DataError: a prompt that is too long for the model.
        ConfigError: earlier answers were computed in another precision than now fits.
        DoesNotFitError: even one row at a time needs more than the budget.
        StoppedError: a signal came.
    """
    todo = [number for number in range(len(rows)) if number not in answered]
    if not todo:
        return
    context = _context(found, [rows[number] for number in todo], settings.max_new_tokens)
    with console.status("planning"):
        plan = planned(
            found,
            hardware,
            precision=settings.precision,
            context=context,
            batch=settings.batch and min(settings.batch, len(todo)),
            rows=len(todo),
        )
    answered.computed_in(plan.base_precision)
    for note in (plan.summary, *found.notes):
        console.print(note, style="dim", markup=False, soft_wrap=True)
    try:
        with stop_on_signal(lambda _: None):
            _answer_all(load(found, plan, hardware), rows, todo, settings, answered, console)
    except Interrupted as interrupt:
        raise StoppedError(
            f"Generating was stopped before all rows were answered: {len(answered)} of {len(rows)} are"
            f"{answered.where}.",
            f"{'Go on with them' if answered.where else 'Start it again'}: {again}",
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
    loaded: Loaded,
    rows: Sequence[Asked],
    todo: Sequence[int],
    settings: Settings,
    answered: Answered,
    console: Console,
) -> None:
    with _progress(console) as bar, memory_errors(loaded.plan):
        task = bar.add_task("answering", total=len(rows), completed=len(answered))
        for numbers in _batches(rows, todo, loaded.plan.batch):
            prompts = [rows[i].ids for i in numbers]
            given = loaded.answers.to(prompts, settings.max_new_tokens, settings.sampling, numbers)
            for number, answer in zip(numbers, given, strict=True):
                answered.add(number, _line(rows[number], answer))
            bar.advance(task, len(numbers))


def _batches(rows: Sequence[Asked], todo: Sequence[int], size: int) -> Iterator[list[int]]:
    """Numbers of rows of like length, the longest first: if memory does not suffice, it shows at once."""
    by_length = sorted(todo, key=lambda i: -len(rows[i].ids))
    for start in range(0, len(todo), size):
        yield by_length[start : start + size]


def _line(row: Asked, answer: Answer) -> str:
    told = row.shown | {"answer": answer.text, "stopped": answer.stopped, "n_tokens": answer.n_tokens}
    return _json(told) + "\n"


def _json(told: dict[str, Any]) -> str:
    return json.dumps(told, ensure_ascii=False, default=str)  # a table's id may be a date


def _progress(console: Console) -> Progress:
    columns = TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console)


class InOrder:
    """Passes each line on as soon as all before it are there; what was passed on is not kept here."""

    where = ""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._waiting: dict[int, str] = {}
        self._n_written = 0

    def __len__(self) -> int:
        return self._n_written + len(self._waiting)

    def __contains__(self, number: object) -> bool:
        return number in self._waiting

    def computed_in(self, precision: str) -> None:
        """Nothing is left of an earlier process."""

    def add(self, number: int, line: str) -> None:
        self._waiting[number] = line
        while self._n_written in self._waiting:
            self._write(self._waiting.pop(self._n_written))
            self._n_written += 1
