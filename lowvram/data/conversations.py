"""Conversations: rows of any known shape as one frozen form, or an error with the line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import islice
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from lowvram.data.sources import read_rows
from lowvram.errors import DataError
from lowvram.frozen import Frozen

Role = Literal["system", "user", "assistant", "tool"]

_ROLES: dict[str, Role] = {
    **{role: role for role in get_args(Role)},
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
}

# In order of precedence: the fields that make a row that shape.
SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
    "text": ("text",),
}

_KNOWN_SHAPES = (
    "Known shapes: messages ([{role, content}]), sharegpt (conversations: [{from, value}]), "
    "alpaca (instruction, input, output), prompt-completion (prompt, completion), "
    "question-answer (question, answer), text."
)


class Message(Frozen):
    """One turn; `extra` holds what only the chat template understands, such as tool_calls."""

    role: Role
    content: str
    extra: dict[str, Any] = Field(default_factory=dict)


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


class LoadedData(Frozen):
    """Every example of one source; `sha256` is of the content alone, whatever the file's name or format."""

    name: str
    shape: str
    sha256: str
    conversations: tuple[Conversation, ...]


def content_sha256(conversation: Conversation) -> str:
    """Hex digest of what is trained on; where it came from does not count."""
    content = conversation.model_dump(exclude={"where"})
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def load_conversations(name: str, *, limit: int | None = None) -> LoadedData:
    """All rows of `name` (the first `limit` of them), in the shape that the first row has.

    Raises:
        DataError: an unreadable source, an unknown or changing shape, a missing or empty field, an unknown
            role, or a conversation without an assistant's answer at its end. Nothing is dropped silently.
    """
    shape, first = "", ""
    conversations: list[Conversation] = []
    digest = hashlib.sha256()
    for where, row in islice(read_rows(name), limit):
        if not shape:
            shape, first = _shape_of(where, row), where
        _require_shape(where, row, shape, first)
        conversation = _READERS[shape](where, row)
        digest.update(content_sha256(conversation).encode())
        conversations.append(conversation)
    return LoadedData(name=name, shape=shape, sha256=digest.hexdigest(), conversations=tuple(conversations))


def _find_shape(row: dict[str, Any]) -> str | None:
    return next((shape for shape, fields in SHAPES.items() if all(f in row for f in fields)), None)


def _shape_of(where: str, row: dict[str, Any]) -> str:
    shape = _find_shape(row)
    if shape is None:
        raise DataError(f"{where}: no known shape; its fields are {_fields(row)}.", _KNOWN_SHAPES)
    return shape


def _require_shape(where: str, row: dict[str, Any], shape: str, first: str) -> None:
    if all(field in row for field in SHAPES[shape]):
        return
    other = _find_shape(row)
    seen = f"has the shape '{other}'" if other else f"has the fields {_fields(row)}, no known shape"
    raise DataError(
        f"{where}: {seen}, but {first} has the shape '{shape}'.",
        f"Give every row the fields of '{shape}': {', '.join(SHAPES[shape])}. {_KNOWN_SHAPES}",
    )


def _fields(row: dict[str, Any]) -> str:
    return ", ".join(str(key) for key in row) or "none"


def _string(where: str, row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(
            f"{where}: the field '{field}' is {kind}, not a string.", "Write it as text in quotes."
        )
    if not value.strip():
        raise DataError(f"{where}: the field '{field}' is empty.", "Fill it in or remove the row.")
    return value


def _text(where: str, row: dict[str, Any]) -> Conversation:
    return Conversation(text=_string(where, row, "text"), where=where)


def _alpaca(where: str, row: dict[str, Any]) -> Conversation:
    question = _string(where, row, "instruction")
    if row.get("input") not in (None, ""):
        question += "\n\n" + _string(where, row, "input")
    return _two_turns(where, row, question, _string(where, row, "output"))


def _question_answer(where: str, row: dict[str, Any]) -> Conversation:
    return _two_turns(where, row, _string(where, row, "question"), _string(where, row, "answer"))


def _prompt_completion(where: str, row: dict[str, Any]) -> Conversation:
    if not isinstance(row["prompt"], list) and not isinstance(row["completion"], list):
        return _two_turns(where, row, _string(where, row, "prompt"), _string(where, row, "completion"))
    turns = [
        *_side(where, row, "prompt", "user"),
        *_side(where, row, "completion", "assistant"),
    ]
    return _conversation(where, row, turns)


def _side(where: str, row: dict[str, Any], field: str, role: Role) -> list[Message]:
    """One half of TRL's conversational form; a plain string is one turn of `role`."""
    if isinstance(row[field], list):
        return _turns(where, row, field)
    return [Message(role=role, content=_string(where, row, field))]


def _messages(where: str, row: dict[str, Any]) -> Conversation:
    return _conversation(where, row, _turns(where, row, "messages"))


def _sharegpt(where: str, row: dict[str, Any]) -> Conversation:
    return _conversation(where, row, _turns(where, row, "conversations"))


def _two_turns(where: str, row: dict[str, Any], question: str, answer: str) -> Conversation:
    turns = [Message(role="user", content=question), Message(role="assistant", content=answer)]
    return _conversation(where, row, turns)


def _conversation(where: str, row: dict[str, Any], turns: list[Message]) -> Conversation:
    if row.get("system") not in (None, ""):
        turns = [Message(role="system", content=_string(where, row, "system")), *turns]
    if turns[-1].role != "assistant":
        raise DataError(
            f"{where}: the last turn is the {turns[-1].role}'s, so there is no answer to learn.",
            "End every conversation with an assistant turn, or remove the row.",
        )
    return Conversation(messages=tuple(turns), where=where, tools=_tools(where, row))


def _tools(where: str, row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = row.get("tools") or []
    if isinstance(tools, str):  # how parquet files carry objects of varying fields
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(
                f"{where}: 'tools' is a string, but not JSON.", "Write tools as a list."
            ) from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: 'tools' is not a list of objects.", "Write tools as [{...}, {...}].")
    return tuple(tools)


def _turns(where: str, row: dict[str, Any], field: str) -> list[Message]:
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: '{field}' is not a list of turns, or is empty.", _KNOWN_SHAPES)
    return [_message(where, turn, f"{field}[{index}]") for index, turn in enumerate(turns)]


def _message(where: str, turn: object, place: str) -> Message:
    """One turn, written as role/content or as ShareGPT's from/value."""
    if not isinstance(turn, dict):
        raise DataError(f"{where}: {place} is a {type(turn).__name__}, not an object.", _KNOWN_SHAPES)
    who, what = ("from", "value") if "from" in turn else ("role", "content")
    name = turn.get(who)
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(
            f"{where}: {place} has the unknown role {name!r}; its fields are {_fields(turn)}.",
            f"Known roles: {', '.join(_ROLES)}.",
        )
    extra = {key: value for key, value in turn.items() if key not in (who, what) and value is not None}
    return Message(role=role, content=_content(where, turn, what, place), extra=extra)


def _content(where: str, turn: dict[str, Any], field: str, place: str) -> str:
    """The turn's text. A turn that only calls tools has none, and a tool may return nothing."""
    value = turn.get(field)
    if isinstance(value, list):
        value = _joined_parts(where, value, place)
    may_be_empty = turn.get("tool_calls") or turn.get("role", turn.get("from")) in ("tool", "observation")
    if may_be_empty and value in (None, ""):
        return ""
    return _string(where, {f"{place}.{field}": value}, f"{place}.{field}")


def _joined_parts(where: str, parts: list[Any], place: str) -> str:
    """OpenAI's list of content parts, text only."""
    if not all(isinstance(p, dict) and p.get("type") == "text" for p in parts):
        raise DataError(f"{where}: {place} holds something other than text.", "Only text can be trained on.")
    return "".join(_string(where, part, "text") for part in parts)


_READERS: dict[str, Callable[[str, dict[str, Any]], Conversation]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "question-answer": _question_answer,
    "text": _text,
}
