"""Turns: a conversation as its chat template shows it, and which characters of that the assistant writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvram.data.control import Controls, unseen
from lowvram.data.conversations import Conversation, Message
from lowvram.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CHAT_TEMPLATE = (
    "{% if tools %}{{ raise_exception('the default template knows no tools') }}{% endif %}"
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['tool_calls'] %}{{ raise_exception('the default template knows no tools') }}{% endif %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)

Span = tuple[int, int]


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
    each turn of several.

    Raises:
        DataError: the template refuses the conversation, or does not show its last turn as an answer.
    """
    if conversation.text is not None:
        end, stopped = controls.end_of_turn(conversation.text, (0, len(conversation.text)))
        return Rendered(conversation.text, ((0, end),), stopped)
    shown, escaped = controls.escape(conversation)
    template = Template(shown, tokenizer)
    full = template.text(len(shown.messages))
    turns = [i for i, message in enumerate(shown.messages) if message.role == "assistant" and message.trained]
    spans: list[Span] = []
    last = None
    for turn in turns:
        last = _span(template, turn, full, controls)
        if last is not None and last[0] < (spans[-1][1] if spans else 0):
            last = None
        spans += [last] if last is not None else []
    if last is None or turns[-1] != len(shown.messages) - 1:
        raise DataError(
            f"{conversation.where}: the chat template does not show the last assistant turn as an answer.",
            "Use a model with another chat template, or train on the text shape.",
        )
    ends = [controls.end_of_turn(full, span) for span in spans]
    found = tuple((first, end) for (first, _), (end, _) in zip(spans, ends, strict=True))
    return Rendered(full, found, ends[-1][1], escaped, len(turns) - len(spans))


class Template:
    """Renders the first turns of one conversation."""

    def __init__(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tools = list(conversation.tools) or None
        self.messages = [_as_dict(message) for message in conversation.messages]
        self._where = conversation.where

    def text(self, turns: int, *, prompt: bool = False, messages: list[dict[str, Any]] | None = None) -> str:
        """Of the first `turns` messages, with the generation prompt if `prompt`.

        Raises:
            DataError: the template raised something.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    (messages or self.messages)[:turns],
                    tools=self._tools,
                    chat_template=None if self._tokenizer.chat_template else DEFAULT_CHAT_TEMPLATE,
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
            )
        except Exception as error:  # a template is a program of the model's author: it raises what it likes
            raise DataError(
                f"{self._where}: the model's chat template refuses this conversation ({error}).",
                "Change the row to turns that this model knows, or use another model.",
            ) from error


def _as_dict(message: Message) -> dict[str, Any]:
    return {**message.extra, "role": message.role, "content": message.content}


def _span(template: Template, turn: int, full: str, controls: Controls) -> Span | None:
    """Characters of assistant turn `turn` in `full`; None if it is shown differently there."""
    last = turn == len(template.messages) - 1
    try:
        prompt = template.text(turn, prompt=True)
        through = full if last else template.text(turn + 1)
    except DataError:
        if last:
            raise
        return None  # a template may refuse a conversation that stops, or starts, here
    if not through.startswith(prompt):
        return None
    own = through[len(prompt) :]
    if full.startswith(prompt):
        return _shown(own, full, len(prompt), controls)
    at = _moved_to(template, turn, full, through)
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


def _moved_to(template: Template, turn: int, full: str, through: str) -> int | None:
    """By how many characters `turn` lies elsewhere in `full` than in the rendering that ends with it.

    Mistral's templates show tools and system prompt with the last user turn, wherever that is. The place is
    found by a mark put into the turn: both renderings must have it once, and without it be as before.
    """
    mark = unseen(full, through)
    messages = list(template.messages)
    marked = _marked(messages[turn], mark)
    if marked is None:
        return None
    messages[turn] = marked
    try:
        both = template.text(len(messages), messages=messages), template.text(turn + 1, messages=messages)
    except DataError:
        return None
    if any(text.count(mark) != 1 for text in both) or [t.replace(mark, "") for t in both] != [full, through]:
        return None
    return both[0].index(mark) - both[1].index(mark)


def _marked(message: dict[str, Any], mark: str) -> dict[str, Any] | None:
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
