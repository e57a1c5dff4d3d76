"""Control tokens: those that a chat template writes, told apart from a row's text that looks like them.

A row may hold "<|im_end|>" as text: somebody asked about chat templates, or wants to break out of his turn. A
tokenizer makes the control token of it, whoever wrote it. Here what a row says is never a control token: not
in a question, where it would end the turn, nor in an answer, where it would be trained as its end. The row is
rendered with a stand-in for each, so that all that are left in the text are the template's own; then the
stand-ins are spelled as plain text (data/spelling.py). The text shape is taken as it is: who renders himself
writes his control tokens so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lowvram.data.conversations import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Controls:
    """The special tokens of one tokenizer."""

    ids: dict[str, int]  # text -> id
    stops: frozenset[int]
    swallowing: tuple[frozenset[str], frozenset[str]]  # that take the white space to their left, right

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """One control token, the longest where several begin."""
        longest_first = sorted(self.ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def longest(self) -> int:
        """Characters of the longest."""
        return max(map(len, self.ids), default=0)

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        stops = (text for text, number in self.ids.items() if number in self.stops)
        return tuple(sorted(stops, key=len, reverse=True))

    def escape(self, conversation: Conversation) -> tuple[Conversation, str]:
        """The conversation with stand-ins for what reads like control tokens, and what these are made of."""
        said = list(_strings([[m.content, m.extra] for m in conversation.messages] + [*conversation.tools]))
        if not any(map(self.pattern.search, said)):
            return conversation, ""
        mark, order = unseen(*said), list(self.ids)

        def stand_in(match: re.Match[str]) -> str:
            return f"{mark}{order.index(match[0])}{mark}"

        def hidden(value: Any) -> Any:
            return _mapped(value, lambda text: self.pattern.sub(stand_in, text))

        messages = tuple(
            m.model_copy(update={"content": hidden(m.content), "extra": hidden(m.extra)})
            for m in conversation.messages
        )
        tools = tuple(hidden(tool) for tool in conversation.tools)
        return conversation.model_copy(update={"messages": messages, "tools": tools}), mark

    def unescape(self, text: str, mark: str) -> str:
        """What the row said."""
        order = list(self.ids)
        return re.sub(f"{mark}([0-9]+){mark}", lambda match: order[int(match[1])], text) if mark else text

    def before(self, text: str, at: int) -> int:
        """`at`, or where the control token begins that it would cut."""
        for match in self.pattern.finditer(text, max(at - self.longest, 0)):
            if match.start() < at < match.end():
                return match.start()
        return at

    def only(self, text: str) -> bool:
        """Whether nothing but control tokens and white space is there."""
        return not self.pattern.sub("", text).strip()

    def end_of_turn(self, text: str, span: tuple[int, int]) -> tuple[int, bool]:
        """Where the turn in `span` ends, and whether with a stop token.

        That is the first one behind which only white space and further ones follow. Those that follow it at
        once belong to it, as where a template writes <|im_end|> and the tokenizer's end token.
        """
        start, end = span
        at, ends = end, []
        while stop := self._stop_before(text, start, at):
            at = stop[0]
            ends.append(stop)
        if not ends:
            return end, False
        end = ends.pop()[1]
        while ends and ends[-1][0] == end:
            end = ends.pop()[1]
        return end, True

    def _stop_before(self, text: str, start: int, end: int) -> tuple[int, int] | None:
        end = start + len(text[start:end].rstrip())
        if not text.endswith(self._ends, start, end):
            return None
        stop = next(stop for stop in self._ends if text.endswith(stop, start, end))
        return end - len(stop), end


def controls_of(tokenizer: PreTrainedTokenizerBase) -> Controls:
    """The special tokens, and those among them that end something."""
    added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {token.content: i for i, token in added.items()}
    ids |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    # Those of the beginning and of the unknown end nothing, unless one of them is the end token as well.
    no_ends = {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    left = frozenset(token.content for token in added.values() if token.lstrip)
    right = frozenset(token.content for token in added.values() if token.rstrip)
    return Controls(ids, frozenset(ids.values()) - no_ends, (left, right))


def unseen(*texts: str) -> str:
    """Letters that occur in none of the texts."""
    number = 0
    while any(f"Zq{number}qZ" in text for text in texts):
        number += 1
    return f"Zq{number}qZ"


def _strings(value: Any) -> Iterator[str]:
    """All in nested lists and dictionaries, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(name)
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Any) -> Any:
    """The same with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(name, change): _mapped(item, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, change) for item in value]
    return value
