"""Conversations: rows of any known shape as one frozen form, or an error with the line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import islice
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from lowvram.data.shapes import KNOWN_SHAPES, SHAPES, Known, Reading, fields_of, has_turns, known_from
from lowvram.data.sources import read_rows
from lowvram.data.tool_calls import calls_of, objects_of
from lowvram.errors import DataError
from lowvram.frozen import Frozen

Role = Literal["system", "user", "assistant", "tool"]

_ROLES: dict[str, Role] = {
    **{role: role for role in get_args(Role)},
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "developer": "system",
}


class Message(Frozen):
    """One turn; `extra` holds what only the chat template understands, such as tool_calls.

    A weight stays in it too, so that runs of before `trained` find the hash of their data unchanged.
    """

    role: Role
    content: str
    extra: dict[str, Any] = Field(default_factory=dict)
    trained: bool = True  # false: OpenAI's "weight": 0, an assistant turn that is only shown


class Conversation(Frozen):
    """One example: either chat turns or plain text, and the place it came from."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    where: str = Field(description="FILE:LINE")
    tools: tuple[dict[str, Any], ...] = Field((), description="tool definitions for the chat template")

    @model_validator(mode="after")
    def _exactly_one(self) -> Conversation:
        if bool(self.messages) == (self.text is not None):
            raise ValueError("a conversation has either messages or text")
        return self


def content_sha256(conversation: Conversation) -> str:
    """Hex digest of what is trained on; where it came from does not count."""
    turns = [
        {"role": m.role, "content": m.content, "extra": m.extra} | ({} if m.trained else {"trained": False})
        for m in conversation.messages
    ]
    content = {"messages": turns, "text": conversation.text, "tools": conversation.tools}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class LoadedData(Frozen):
    """Every example of one source, in memory."""

    name: str
    shape: str
    sha256: str
    conversations: tuple[Conversation, ...]


def load_conversations(
    name: str,
    reading: Reading = Reading(),  # noqa: B008  # frozen
    *,
    limit: int | None = None,
) -> LoadedData:
    """All rows of a small source (the first `limit` of them), as benchmarks and tests look at them.

    Raises:
        DataError: the first row that cannot be used.
    """
    known: Known | None = None
    conversations: list[Conversation] = []
    digest = hashlib.sha256()
    for where, row in islice(read_rows(name, reading.split), limit):
        known = known or known_from(where, row, reading)
        conversations.append(conversation_of(where, row, known))
        digest.update(content_sha256(conversations[-1]).encode())
    shape = known.shape if known else ""
    return LoadedData(name=name, shape=shape, sha256=digest.hexdigest(), conversations=tuple(conversations))


def conversation_of(where: str, row: dict[str, Any], known: Known) -> Conversation:
    """One row of a known shape.

    Raises:
        DataError: another shape, a missing or empty field, an unknown role, or no assistant's answer at its
            end.
    """
    return _READERS[known.shape](where, known.named_our_way(where, row), known)


def string_of(where: str, row: dict[str, Any], field: str) -> str:
    """The text in `field`.

    Raises:
        DataError: there is none.
    """
    value = row.get(field)
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(
            f"{where}: the field '{field}' is {kind}, not a string.", "Write it as text in quotes."
        )
    if not value.strip():
        raise DataError(f"{where}: the field '{field}' is empty.", "Fill it in or remove the row.")
    return value


def _text(where: str, row: dict[str, Any], _: Known) -> Conversation:
    return Conversation(text=string_of(where, row, "text"), where=where)


def _pair(where: str, row: dict[str, Any], known: Known) -> Conversation:
    """Two fields, one turn each; an instruction's input follows it after an empty line."""
    asks, answers = SHAPES[known.shape].needs
    question = string_of(where, row, asks)
    for field in ("input", "context"):
        if field in SHAPES[known.shape].takes and row.get(field) not in (None, ""):
            question += "\n\n" + string_of(where, row, field)
    turns = [
        Message(role="user", content=question),
        Message(role="assistant", content=string_of(where, row, answers)),
    ]
    return _conversation(where, row, turns)


def _prompt_completion(where: str, row: dict[str, Any], known: Known) -> Conversation:
    if not isinstance(row["prompt"], list) and not isinstance(row["completion"], list):
        return _pair(where, row, known)
    turns = [
        *_side(where, row, "prompt", "user"),
        *_side(where, row, "completion", "assistant"),
    ]
    return _conversation(where, row, turns)


def _side(where: str, row: dict[str, Any], field: str, role: Role) -> list[Message]:
    """One half of TRL's conversational form; a plain string is one turn of `role`."""
    if isinstance(row[field], list):
        return turns_of(where, row, field)
    return [Message(role=role, content=string_of(where, row, field))]


def _list_of_turns(where: str, row: dict[str, Any], known: Known) -> Conversation:
    return _conversation(where, row, turns_of(where, row, SHAPES[known.shape].needs[0], known.fields))


def _conversation(where: str, row: dict[str, Any], turns: list[Message]) -> Conversation:
    if system := next((name for name in ("system", "system_prompt") if row.get(name) not in (None, "")), ""):
        turns = [Message(role="system", content=string_of(where, row, system)), *turns]
    if turns[-1].role != "assistant":
        raise DataError(
            f"{where}: the last turn is the {turns[-1].role}'s, so there is no answer to learn.",
            "End every conversation with an assistant turn, or remove the row.",
        )
    return Conversation(messages=tuple(_up_to_trained(where, turns)), where=where, tools=_tools(where, row))


def _up_to_trained(where: str, turns: list[Message]) -> list[Message]:
    """Without what follows the last trained turn, for nothing is learned from it."""
    trained = [n for n, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
    if not trained:
        raise DataError(
            f"{where}: every assistant turn has the weight 0, so there is no answer to learn.",
            'Give one of them "weight": 1, or remove the row.',
        )
    return turns[: trained[-1] + 1]


def _tools(where: str, row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return tuple(objects_of(where, row["tools"], "'tools'")) if row.get("tools") else ()


def turns_of(
    where: str, row: dict[str, Any], field: str, names: dict[str, str] | None = None
) -> list[Message]:
    """Each turn of a list in `field`, written as role/content, or as `names` calls them.

    An empty system turn is none, like a row's empty field `system`.

    Raises:
        DataError: it is no list of turns.
    """
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: '{field}' is not a list of turns, or is empty.", KNOWN_SHAPES)
    places = ((turn, f"{field}[{index}]") for index, turn in enumerate(turns))
    found = [message for t, place in places if (message := _message(where, t, place, names or {}))]
    if not found:
        raise DataError(f"{where}: '{field}' holds nothing but an empty system turn.", "Add turns to it.")
    return found


def _message(where: str, turn: object, place: str, names: dict[str, str]) -> Message | None:
    """One turn, written as role/content or as ShareGPT's from/value, or under the names that were given.

    None of an empty system turn.
    """
    if not isinstance(turn, dict):
        raise DataError(f"{where}: {place} is a {type(turn).__name__}, not an object.", KNOWN_SHAPES)
    who, what = ("from", "value") if "from" in turn else ("role", "content")
    who, what = names.get("role", who), names.get("content", what)
    name = turn.get(who)
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(
            f"{where}: {place} has the unknown role {name!r}; its fields are {fields_of(turn)}.",
            f"Known roles: {', '.join(_ROLES)}.",
        )
    extra = {key: value for key, value in turn.items() if key not in (who, what) and value is not None}
    if extra.get("tool_calls"):
        extra["tool_calls"] = calls_of(where, extra["tool_calls"], f"{place}.tool_calls")
    content = _content(where, turn, what, place, role)
    if role == "system" and not content:
        return None
    trained = role != "assistant" or _is_trained(where, extra.get("weight", 1), place)
    return Message(role=role, content=content, extra=extra, trained=trained)


def _is_trained(where: str, weight: Any, place: str) -> bool:
    """By OpenAI's weight of an assistant turn; 1.0 is how parquet files may carry it."""
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(
            f"{where}: {place} has the weight {weight!r}.",
            "Write 1 for a turn that is trained, 0 for one that is only shown.",
        )
    return bool(weight)


def _content(where: str, turn: dict[str, Any], field: str, place: str, role: Role) -> str:
    """The turn's text. A turn that only calls tools has none, nor one of an empty system text or result."""
    value = turn.get(field)
    if isinstance(value, list):
        value = _joined_parts(where, value, place)
    may_be_empty = turn.get("tool_calls") or role in ("tool", "system")
    if may_be_empty and value in (None, ""):
        return ""
    return string_of(where, {f"{place}.{field}": value}, f"{place}.{field}")


def _joined_parts(where: str, parts: list[Any], place: str) -> str:
    """OpenAI's list of content parts, text only."""
    if not all(isinstance(p, dict) and p.get("type") == "text" for p in parts):
        raise DataError(f"{where}: {place} holds something other than text.", "Only text can be trained on.")
    return "".join(string_of(where, part, "text") for part in parts)


_READERS: dict[str, Callable[[str, dict[str, Any], Known], Conversation]] = {
    **{name: _list_of_turns if has_turns(name) else _pair for name in SHAPES},
    "prompt-completion": _prompt_completion,
    "text": _text,
}
