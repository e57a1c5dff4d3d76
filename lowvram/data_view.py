"""`lowvram data check`: format, counts, lengths, and the first example with its trained tokens coloured."""

from __future__ import annotations

import json
from itertools import groupby, islice
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lowvram.data.conversations import LoadedData, load_conversations
from lowvram.data.split import split_held_out
from lowvram.data.tokens import Example
from lowvram.units import printable

_SHOWN_TOKENS = 400


def check(name: str, model: str | None, as_json: bool, console: Console) -> None:
    """Print what lowvram sees in the data; with a model, what the model sees.

    Raises:
        DataError: the file and line that cannot be used.
        ConfigError: the model has no tokenizer.
    """
    if model is None:
        data = load_conversations(name)
        train, held_out = split_held_out(data.conversations)  # refuses what training would refuse
        facts = _counts(name, data.shape, len(train), len(held_out))
        first = None
    else:
        facts, first, tokenizer = _with_tokens(name, model)
    if as_json:
        console.print(json.dumps(facts, indent=2), markup=False, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        table.add_row(f"[dim]{key.replace('_', ' ')}", escape(printable(str(value))))
    console.print(table)
    if first is not None:
        console.print("[dim]Tokens are those of the examples trained on, without the held-out ones.")
        console.print(Panel(colored(first, tokenizer), title="first example: trained tokens are green"))
    else:
        console.print(_first_text(data))


def _counts(name: str, shape: str, trained: int, held_out: int) -> dict[str, Any]:
    return {
        "data": name,
        "shape": shape,
        "examples": trained + held_out,
        "examples_trained": trained,
        "held_out": held_out,
    }


def _with_tokens(name: str, model: str) -> tuple[dict[str, Any], Example, Any]:
    from lowvram.engine.source import ModelSource
    from lowvram.training.data import prepare

    source = ModelSource(model)
    prepared = prepare(name, source)
    stats = prepared.stats
    quantile = stats.length_quantiles
    return (
        _counts(name, stats.shape, stats.n_examples, stats.n_held_out)
        | {
            "chat_template": stats.template,
            "tokens": stats.n_tokens,
            "trained_share": round(stats.trained_share, 4),
            "tokens_median": quantile[50],
            "tokens_95_percent": quantile[95],
            "tokens_longest": stats.longest_tokens,
        },
        prepared.train[0],
        source.tokenizer,
    )


def colored(example: Example, tokenizer: Any) -> Text:
    """The example's tokens as text, those that are trained in green."""
    text = Text()
    tokens = islice(zip(example.input_ids, example.trained, strict=True), _SHOWN_TOKENS)
    for trained, run in groupby(tokens, key=lambda token: token[1]):
        # decoded together: an emoji is several tokens, none of which is a character
        shown = tokenizer.decode([i for i, _ in run], clean_up_tokenization_spaces=False)
        text.append(printable(shown), style="green" if trained else "dim")
    if len(example.input_ids) > _SHOWN_TOKENS:
        text.append(f" ... {len(example.input_ids) - _SHOWN_TOKENS} more tokens", style="italic")
    return text


def _first_text(data: LoadedData) -> Panel:
    conversation = data.conversations[0]
    text = Text()
    if conversation.text is not None:
        text.append(printable(conversation.text), style="green")
    for message in conversation.messages:
        text.append(f"{message.role}: ", style="bold")
        shown = printable(message.content) + "\n"
        text.append(shown, style="green" if message.role == "assistant" else "dim")
    return Panel(text, title="first example: what is trained is green (give --model to count tokens)")
