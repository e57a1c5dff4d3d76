"""What a chat template puts between the messages, found by rendering it, and the same for Ollama in Go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, str]
_SYSTEM, _USER, _ANSWER, _AGAIN = "lowvram-system", "lowvram-user", "lowvram-answer", "lowvram-again"
_PROBES: tuple[tuple[str, ...], ...] = (  # contents in turn, user first
    ("What is 2 + 2?",),
    ("Name a colour.", "Blue.\n\nOr green.", "Why?"),
    ("Ünïcode 你好 🙂", "{{ .System }}", 'a "quote" \\ and\ta tab', "yes", "<b>3</b>"),
)


@dataclass(frozen=True)
class ChatFormat:
    """The fixed texts around the contents of a conversation."""

    start: str  # before the first question, without a system message
    system: str  # before the system message
    after_system: str  # between it and the question behind it
    answer: str  # between a question and its answer
    again: str  # between an answer and the next question
    asks: str  # behind the last question
    system_last: bool = False  # it goes in front of the last question, not the first (Mistral v3 and later)
    own_system: bool = True  # the template has a place for it; else it is put in front of the question

    def rendered(self, messages: Sequence[Message]) -> str:
        """A conversation that ends with a question, as `go_template` would write it."""
        told = [m["content"] for m in messages if m["role"] == "system"]
        turns = [m for m in messages if m["role"] != "system"]
        text = self.system + told[0] + self.after_system if told and not self.system_last else ""
        for number, message in enumerate(turns):
            if message["role"] == "assistant":
                text += self.answer
            elif number:
                text += self.again
            elif not text:
                text += self.start
            if told and self.system_last and number == len(turns) - 1:
                text += told[0] + self.after_system
            text += message["content"]
        return text + self.asks

    def without_start(self, token: str) -> ChatFormat:
        """Where the engine puts the start token itself."""
        return replace(self, start=self.start.removeprefix(token), system=self.system.removeprefix(token))

    @property
    def go_template(self) -> str:
        """For Ollama (docs/template.md there): Go's text/template over .Messages.

        Every fixed text is a string in quotes, since "{{-" and "-}}" trim only what stands outside of them.
        """
        again = _put(self.again)
        told = _put(self.system) + "{{- $m.Content -}}"
        first = f'{{{{- if eq $before "" -}}}}{_put(self.start)}'
        behind = f'{{{{- else if eq $before "system" -}}}}{_put(self.after_system)}'
        late = ""
        if self.system_last:
            told = behind = ""
            put = "{{- $.System -}}" + _put(self.after_system)
            late = "{{- if and $last $.System -}}" + put + "{{- end -}}\n"
        remember = "{{- $before = $m.Role -}}"
        return (
            '{{- $before := "" -}}\n'
            "{{- range $i, $m := .Messages -}}\n"
            "{{- $last := eq (len (slice $.Messages $i)) 1 -}}\n"
            f'{{{{- if eq $m.Role "system" -}}}}\n{told}{"" if self.system_last else remember}\n'
            '{{- else if eq $m.Role "user" -}}\n'
            f"{first}{behind}{{{{- else -}}}}{again}{{{{- end -}}}}\n"
            f"{late}{{{{- $m.Content -}}}}{remember}\n"
            f"{{{{- if $last -}}}}{_put(self.asks)}{{{{- end -}}}}\n"
            '{{- else if eq $m.Role "assistant" -}}\n'
            f"{_put(self.answer)}{{{{- $m.Content -}}}}{remember}\n"
            "{{- end -}}\n{{- end -}}"
        )


def _put(text: str) -> str:
    """One fixed text; JSON's escapes are Go's."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}" if text else ""


def chat_format(tokenizer: Any) -> ChatFormat | None:
    """What the tokenizer's own template writes around the contents; None where that is not a fixed text.

    It is read off two renderings and then has to give those of the probe conversations, with and without a
    system message, to the letter.
    """
    from jinja2 import TemplateError

    try:
        found = _read_off(tokenizer)
        agrees = found is not None and all(
            found.rendered(messages) == _render(tokenizer, messages) for messages in _probes(found)
        )
    except TemplateError:  # it refuses a conversation that every chat has
        return None
    return found if agrees else None


def _read_off(tokenizer: Any) -> ChatFormat | None:
    turns = _between(tokenizer, ((_USER, "user"), (_ANSWER, "assistant"), (_AGAIN, "user")))
    if turns is None:
        return None
    start, answer, again, asks = turns
    plain = ChatFormat(start, start, "\n\n", answer, again, asks, own_system=False)
    if not _takes_system(tokenizer):
        return plain
    told = ((_SYSTEM, "system"), (_USER, "user"), (_ANSWER, "assistant"), (_AGAIN, "user"))
    first = _between(tokenizer, told)
    if first is not None:
        return replace(plain, system=first[0], after_system=first[1], own_system=True)
    last = _between(tokenizer, told, shown=(_USER, _ANSWER, _SYSTEM, _AGAIN))
    if last is None:
        return None
    return replace(plain, after_system=last[3], system_last=True, own_system=True)


def _takes_system(tokenizer: Any) -> bool:
    from jinja2 import TemplateError

    try:
        return _SYSTEM in _render(tokenizer, _messages(((_SYSTEM, "system"), (_USER, "user"))))
    except TemplateError:
        return False


def _between(
    tokenizer: Any, turns: Sequence[tuple[str, str]], shown: Sequence[str] | None = None
) -> list[str] | None:
    """What stands before, between and behind the contents, where they come once each and in that order."""
    rest, texts = _render(tokenizer, _messages(turns)), []
    for content in shown or [text for text, _ in turns]:
        before, found, rest = rest.partition(content)
        if not found:
            return None
        texts.append(before)
    return [*texts, rest]


def _messages(turns: Sequence[tuple[str, str]]) -> list[Message]:
    return [{"role": role, "content": text} for text, role in turns]


def _probes(found: ChatFormat) -> list[list[Message]]:
    turns = [
        _messages([(text, "assistant" if n % 2 else "user") for n, text in enumerate(contents)])
        for contents in _PROBES
    ]
    if not found.own_system:
        return turns
    return turns + [[{"role": "system", "content": "Be brief."}, *probe] for probe in turns]


def _render(tokenizer: Any, messages: Sequence[Message]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
