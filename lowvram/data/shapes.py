"""Shapes: by which fields a row is known as messages, Alpaca, question/answer ..., or as the user says."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import Field, field_validator

from lowvram.errors import ConfigError, DataError
from lowvram.frozen import Frozen


class Shape(NamedTuple):
    """The fields that a row of this shape must have, and those that it may have besides."""

    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()


_AROUND = ("system", "system_prompt", "tools")
_TURNS = ("role", "content")  # of each turn, not of the row


def _pair(question: str, answer: str, *takes: str) -> Shape:
    return Shape((question, answer), (*takes, *_AROUND))


# In order of precedence: a row with the fields of several is the first of them.
SHAPES: dict[str, Shape] = {
    "messages": Shape(("messages",), _AROUND),
    "sharegpt": Shape(("conversations",), _AROUND),
    "conversation": Shape(("conversation",), _AROUND),
    "alpaca": _pair("instruction", "output", "input"),
    "prompt-completion": _pair("prompt", "completion"),
    "question-answer": _pair("question", "answer"),
    "instruction-response": _pair("instruction", "response", "input", "context"),  # Dolly
    "question-response": _pair("question", "response"),  # OpenOrca
    "prompt-response": _pair("prompt", "response"),
    "query-response": _pair("query", "response"),  # MetaMath
    "problem-solution": _pair("problem", "solution"),
    "inputs-targets": _pair("inputs", "targets"),  # Aya, FLAN
    "input-output": _pair("input", "output"),
    "text": Shape(("text",)),
}

KNOWN_SHAPES = (
    "Known shapes: messages ([{role, content}]), sharegpt (conversations: [{from, value}]), "
    "alpaca (instruction, input, output), text, and "
    + ", ".join(name for name in SHAPES if "-" in name)
    + " (two fields of those names). Other names: --fields question=THEIRS,answer=THEIRS."
)


class Reading(Frozen):
    """How a source is read, where it does not speak for itself."""

    shape: str | None = Field(None, description="of every row; empty: that of the first row")
    fields: dict[str, str] = Field(default_factory=dict, description="our name of a field: the data's name")
    split: str | None = Field(None, description="of a hub data set; empty: train")
    skip_bad: bool = Field(False, description="leave out rows that cannot be used instead of stopping")

    @field_validator("shape")
    @classmethod
    def _known(cls, shape: str | None) -> str | None:
        if shape is not None and shape not in SHAPES:
            raise ValueError(f"'{shape}' is no known shape: use {', '.join(SHAPES)}")
        return shape


def reading_from(shape: str | None, fields: str | None, split: str | None, skip_bad: bool) -> Reading:
    """From the flags --data-format, --fields, --split and --skip-bad.

    Raises:
        ConfigError: an unknown shape, or fields that no shape has.
    """
    if shape is not None and shape not in SHAPES:
        raise ConfigError(f"--data-format '{shape}' is no known shape.", f"Use {', '.join(SHAPES)}.")
    named = _parse_fields(fields)
    if named:
        shape = shape or _shape_with(tuple(named))
        _require_fields_of(shape, tuple(named))
    return Reading(shape=shape, fields=named, split=split, skip_bad=skip_bad)


def _parse_fields(text: str | None) -> dict[str, str]:
    if text is None:
        return {}
    sides = [part.partition("=") for part in text.split(",")]
    parts = [(ours.strip(), theirs.strip()) for ours, _, theirs in sides]
    if not all(ours and theirs for ours, theirs in parts) or len(dict(parts)) < len(parts):
        raise ConfigError(
            f"--fields '{text}' is no list of different OURS=THEIRS.",
            "Write it like --fields question=ask,answer=reply.",
        )
    return dict(parts)


def _may_have(shape: str) -> tuple[str, ...]:
    known = SHAPES[shape]
    return (*known.needs, *known.takes, *(_TURNS if has_turns(shape) else ()))


def has_turns(shape: str) -> bool:
    """Whether a row of this shape is a list of turns."""
    return shape in ("messages", "sharegpt", "conversation")


def _shape_with(names: tuple[str, ...]) -> str:
    """The first shape that has all these fields, if possible with none missing."""
    fitting = [shape for shape in SHAPES if set(names) <= set(_may_have(shape))]
    whole = [shape for shape in fitting if set(SHAPES[shape].needs) <= set(names)]
    found = (whole or fitting or [""])[0]
    if not found:
        raise ConfigError(f"--fields: no shape has the fields {', '.join(names)} together.", KNOWN_SHAPES)
    return found


def _require_fields_of(shape: str, names: tuple[str, ...]) -> None:
    if unknown := [name for name in names if name not in _may_have(shape)]:
        raise ConfigError(
            f"--fields: the shape '{shape}' has no field '{unknown[0]}'.",
            f"Its fields are {', '.join(_may_have(shape))}.",
        )


class Known(NamedTuple):
    """The shape that every row must have, and the row that showed it ("" when the user said it)."""

    shape: str
    first: str
    fields: dict[str, str]

    def named_our_way(self, where: str, row: dict[str, Any]) -> dict[str, Any]:
        """The row under our names of its fields.

        Raises:
            DataError: it has another shape, or lacks a field that --fields names.
        """
        if self.fields:
            row = _renamed(where, row, {o: t for o, t in self.fields.items() if o not in _TURNS})
        if all(field in row for field in SHAPES[self.shape].needs):
            return row
        raise self._other(where, row)

    def _other(self, where: str, row: dict[str, Any]) -> DataError:
        other = find_shape(row)
        seen = f"has the shape '{other}'" if other else f"has the fields {fields_of(row)}, no known shape"
        expected = f"{self.first} has the shape" if self.first else "it is read as the shape"
        return DataError(
            f"{where}: {seen}, but {expected} '{self.shape}'.",
            f"Give every row the fields of '{self.shape}': {', '.join(SHAPES[self.shape].needs)}, or leave "
            f"rows of another shape out: --skip-bad. {KNOWN_SHAPES}",
        )

    def unread(self, row: dict[str, Any]) -> tuple[str, ...]:
        """Fields of a row that nothing is made of."""
        known = SHAPES[self.shape]
        read = {self.fields.get(name, name) for name in (*known.needs, *known.takes)}
        return tuple(str(name) for name in row if name not in read)


def _renamed(where: str, row: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    for theirs in fields.values():
        if theirs not in row:
            raise DataError(
                f"{where}: no field '{theirs}', which --fields names; its fields are {fields_of(row)}.",
                "Name a field that every row has.",
            )
    return row | {ours: row[theirs] for ours, theirs in fields.items()}


def find_shape(row: dict[str, Any]) -> str | None:
    """The first shape whose fields the row has."""
    return next((name for name, shape in SHAPES.items() if all(f in row for f in shape.needs)), None)


def known_from(where: str, row: dict[str, Any], reading: Reading) -> Known:
    """What the first row shows, or the user said.

    Raises:
        DataError: no known shape.
    """
    if reading.shape is not None:
        return Known(reading.shape, "", reading.fields)
    shape = find_shape(row)
    if shape is None:
        raise DataError(f"{where}: no known shape; its fields are {fields_of(row)}.", KNOWN_SHAPES)
    return Known(shape, where, reading.fields)


def fields_of(row: dict[str, Any]) -> str:
    """Their names, as an error shows them."""
    return ", ".join(str(key) for key in row) or "none"
