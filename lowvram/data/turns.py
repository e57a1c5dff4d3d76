"""Turns: a conversation as its chat template shows it, and which characters of that the assistant writes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowvram.data.control import Controls, unseen
from lowvram.data.conversations import Conversation
from lowvram.data.template import Template, Turn, template_of
from lowvram.data.tool_use import require_said, require_shown
from lowvram.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

_QUESTION: Turn = {
    "role": "user",
    "content": "?",
}  # of which only the length matters, and that goes out again


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text the model sees, and the character spans in it that are trained.

    Where the row itself writes control tokens, `text` holds stand-ins for them (data/control.py).
    """

    text: str
    spans: tuple[Span, ...]
    stopped: bool  # whether the last span ends with a stop token
    escaped: str = ""  # what the stand-ins are made of; "" where there are none
    skipped_turns: int = 0


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, controls: Controls) -> Rendered:
    """The conversation as text, and the assistant's turns in it, each with its end-of-turn token.

    A turn begins where the rendering of the turns before it, with the generation prompt, ends, and ends where
    the rendering of the turns up to it ends: exactly what the model is given, and has to write. Nothing is
    searched for by its words, which a user may have written too. Two renderings for a single turn, two for
    each turn of several, three more for one that opens the conversation, and two for one that is shown
    elsewhere (`_moved_to`). Tools and each call take one more (`require_shown`).

    Raises:
        DataError: the template refuses the conversation, leaves tools out of it, or does not show its last
            turn as an answer.
    """
    if conversation.text is not None:
        end, stopped = controls.end_of_turn(conversation.text, (0, len(conversation.text)))
        return Rendered(conversation.text, ((0, end),), stopped)
    shown, escaped = controls.escape(conversation)
    template = template_of(shown, tokenizer)
    full = template.whole()
    require_shown(template)
    turns = [i for i, message in enumerate(shown.messages) if message.role == "assistant" and message.trained]
    spans = _spans(template, turns, full, controls)
    if spans[-1:] == [None] or turns[-1:] != [len(shown.messages) - 1]:
        raise DataError(
            f"{conversation.where}: the chat template does not show the last assistant turn as an answer.",
            "Use a model with another chat template, or train on the text shape.",
        )
    found = [span for span in spans if span is not None]
    ends = [controls.end_of_turn(full, span) for span in found]
    trained = tuple((first, end) for (first, _), (end, _) in zip(found, ends, strict=True))
    return Rendered(full, trained, ends[-1][1], escaped, len(turns) - len(found))


def _spans(template: Template, turns: list[int], full: str, controls: Controls) -> list[Span | None]:
    """Of each assistant turn, in order.

    Raises:
        DataError: the last is refused, or one that says something would be trained as its end alone.
    """
    spans: list[Span | None] = []
    behind = 0
    for turn in turns:
        span = _span(template, turn, full, controls)
        if span is not None and span[0] < behind:
            span = None
        if span is not None:
            require_said(template, turn, controls.only(full[slice(*span)]))
            behind = span[1]
        spans.append(span)
    return spans


def _span(template: Template, turn: int, full: str, controls: Controls) -> Span | None:
    """Characters of assistant turn `turn` in `full`; None if it is shown differently there."""
    before, last = template.messages[:turn], turn == len(template.messages) - 1
    opens = all(message["role"] == "system" for message in before)
    try:
        found = _span_behind(before, template, turn, full, controls) if before else None
    except DataError:
        if last and not opens:
            raise
        found = None  # a template may refuse a conversation that stops, or starts, here
    if found is None and opens:
        # transformers renders no empty conversation, and some templates none without a question
        with suppress(DataError):
            return _span_behind([*before, _QUESTION], template, turn, full, controls)
    return found


def _span_behind(
    before: list[Turn], template: Template, turn: int, full: str, controls: Controls
) -> Span | None:
    """As `_span`, by the renderings of `before` with the generation prompt, and of the turn behind it."""
    shown = [*before, template.messages[turn]]
    prompt = template.text(before, prompt=True)
    through = full if shown == template.messages else template.text(shown)
    if not through.startswith(prompt):
        return None
    own = through[len(prompt) :]
    if full.startswith(prompt):
        return _shown(own, full, len(prompt), controls)
    at = _moved_to(template, turn, full, shown, through)
    return None if at is None else _shown(own, full, len(prompt) + at, controls)


def _shown(own: str, full: str, at: int, controls: Controls) -> Span | None:
    """The part of a turn's text that `full` has at `at`; None unless that is all but control tokens.

    Phi-3 for one writes <|endoftext|> behind a conversation that ends with an answer, and not between turns.
    """
    if at < 0:
        return None
    if full.startswith(own, at):
        return at, at + len(own)
    pairs = enumerate(zip(own, full[at:], strict=False))
    same = next((n for n, (a, b) in pairs if a != b), min(len(own), len(full) - at))
    same = controls.before(own, same)
    same = controls.before(full[at : at + len(own) + controls.longest], same)
    return (at, at + same) if controls.only(own[same:]) else None


def _moved_to(template: Template, turn: int, full: str, shown: list[Turn], through: str) -> int | None:
    """By how many characters `turn` lies elsewhere in `full` than in `through`, the rendering of `shown`.

    Mistral's templates show tools and system prompt with the last user turn, wherever that is. The place is
    found by a mark put into the turn: both renderings must have it once, and without it be as before.
    """
    mark, messages = unseen(full, through), list(template.messages)
    marked = _marked(messages[turn], mark)
    if marked is None:
        return None
    messages[turn] = marked
    try:
        both = template.text(messages), template.text([*shown[:-1], marked])
    except DataError:
        return None
    if any(text.count(mark) != 1 for text in both) or [t.replace(mark, "") for t in both] != [full, through]:
        return None
    return both[0].index(mark) - both[1].index(mark)


def _marked(message: Turn, mark: str) -> Turn | None:
    """With the mark before the first letter of what it says, or of the function that it calls."""
    content, calls = message["content"], message.get("tool_calls")
    said = content.lstrip()
    if said or not calls:
        return {**message, "content": content[: len(content) - len(said)] + mark + said}
    if not isinstance(calls, Sequence) or not isinstance(calls[0], dict):
        return None
    function = calls[0].get("function", calls[0])
    if not isinstance(function, dict) or "name" not in function:
        return None
    named = {**function, "name": f"{mark}{function['name']}"}
    first = {**calls[0], "function": named} if "function" in calls[0] else named
    return {**message, "tool_calls": [first, *calls[1:]]}
