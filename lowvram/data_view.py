"""`lowvram data check`: format, counts, lengths, bad rows, and the first example with its tokens coloured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lowvram.data.conversations import Conversation, conversation_of
from lowvram.data.shapes import Reading
from lowvram.data.sources import opened, rows_of
from lowvram.data.tokens import Example
from lowvram.data.work_force import progress_line
from lowvram.data_report import Report, report_on
from lowvram.errors import ConfigError, DataError, refusals_of_the_system
from lowvram.frozen import require_new_file, write_atomically
from lowvram.units import format_bytes, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN_TOKENS = 400
_IN_BYTES = ("prepared_bytes", "cache_bytes")


def check(
    name: str,
    model: str | None,
    console: Console,
    *,
    reading: Reading = Reading(),  # noqa: B008  # frozen
    seq_len: int | None = None,
    html: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print what lowvram sees in the data; with a model, what the model sees; with `html`, save it as a page.

    Raises:
        DataError: rows that cannot be used (all of them are counted first), or nothing readable there.
        ConfigError: the model has no tokenizer, or what needs one was asked for without a model.
    """
    for flag, asked in (("--seq-len", seq_len), ("--html", html)):
        if asked is not None and model is None:
            raise ConfigError(f"{flag} is about tokens, which need a model.", "Give it: --model NAME.")
    if html is not None:
        require_new_file(html, "--html")
    with Console(stderr=True).status("reading") as status:
        tokenizer, pairs = _tokenizer(model)
        report = report_on(
            name,
            tokenizer,
            reading,
            seq_len,
            lambda done, left: status.update(escape(progress_line(name, done, left))),
            pairs,
        )
    if as_json:
        console.print(json.dumps(report.facts, indent=2), markup=False, soft_wrap=True)
    else:
        _show(report, reading, console)
    if html is not None:
        _save(report, html, Console(stderr=True) if as_json else console)
    report.require_usable(reading)


def _tokenizer(model: str | None) -> tuple[PreTrainedTokenizerBase | None, bool]:
    """And whether its model is an encoder-decoder; a tokenizer without a model's config has none."""
    if model is None:
        return None, False
    from lowvram.engine.source import ModelSource

    source, pairs = ModelSource(model), False
    with suppress(ConfigError):
        pairs = bool(source.config.is_encoder_decoder)
    return source.tokenizer, pairs


def _save(report: Report, html: Path, console: Console) -> None:
    from lowvram.data_page import page

    with refusals_of_the_system(f"'{html}' cannot be written", "Give another --html."):
        write_atomically(html, page(report))
    console.print(f"Saved. Open it in a browser: {escape(str(html))}")


def _show(report: Report, reading: Reading, console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    for key, value in told(report.facts):
        table.add_row(f"[dim]{key}", escape(printable(value)))
    console.print(table)
    for line in report.facts["bad"]:
        console.print(f"[red]bad[/] {escape(printable(line))}", soft_wrap=True)
    if report.facts["bad_rows"] > len(report.facts["bad"]):
        console.print(f"[red]bad[/] and {report.facts['bad_rows'] - len(report.facts['bad'])} more rows")
    if report.tokenizer is not None:
        console.print("[dim]Tokens are those of the examples trained on, without the held-out ones.")
        shown = colored(report.train[0], report.tokenizer)
        console.print(Panel(shown, title="first example: trained tokens are green"))
    else:
        console.print(_first_text(report, reading))


def told(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The facts as people read them."""
    for key, value in facts.items():
        if key in ("bad", "shape_found") or value == []:
            continue
        if key == "shape":
            value = f"{value} ({'found' if facts['shape_found'] else 'as you said'})"
        elif isinstance(value, list):
            value = ", ".join(value)
        elif key in _IN_BYTES:
            value = format_bytes(value)
        elif isinstance(value, int):
            value = f"{value:,}"
        yield key.replace("_", " "), str(value)


def runs(example: Example, tokenizer: Any, at_most: int) -> Iterator[tuple[bool, str]]:
    """(trained, text) of neighbouring tokens alike, of the first `at_most` tokens."""
    for trained, run in groupby(islice(example.tokens(), at_most), key=lambda token: token[1]):
        # decoded together: an emoji is several tokens, none of which is a character
        shown = tokenizer.decode([i for i, _ in run], clean_up_tokenization_spaces=False)
        yield trained, printable(shown)


def colored(example: Example, tokenizer: Any) -> Text:
    """The example's tokens as text, those that are trained in green."""
    text = Text()
    for trained, shown in runs(example, tokenizer, _SHOWN_TOKENS):
        text.append(shown, style="green" if trained else "dim")
    if example.n_tokens > _SHOWN_TOKENS:
        text.append(f" ... {example.n_tokens - _SHOWN_TOKENS} more tokens", style="italic")
    return text


def _first_text(report: Report, reading: Reading) -> Panel:
    conversation = _first_conversation(report, reading)
    text = Text()
    if conversation.text is not None:
        text.append(printable(conversation.text), style="green")
    for message in conversation.messages:
        text.append(f"{message.role}: ", style="bold")
        shown = printable(message.content) + "\n"
        text.append(shown, style="green" if message.role == "assistant" else "dim")
    return Panel(text, title="first example: what is trained is green (give --model to count tokens)")


def _first_conversation(report: Report, reading: Reading) -> Conversation:
    """The first good row, read again: only numbers of it were kept."""
    with opened(report.store.entry.name, reading.split) as source:
        for number, row in rows_of(source):
            if source.place(number) == report.store.place(0) and not isinstance(row, DataError):
                return conversation_of(source.place(number), row, report.store.entry.known)
    raise DataError(f"{report.store.place(0)}: the file changed while it was read.", "Try again.")
