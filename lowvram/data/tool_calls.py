"""Tool calls: definitions and calls of a row in the one form that chat templates expect, as objects."""

from __future__ import annotations

import json
from typing import Any

from lowvram.errors import DataError


def objects_of(where: str, value: Any, place: str) -> list[dict[str, Any]]:
    """The list of objects in `value`; parquet files carry objects of varying fields as one string of JSON.

    Raises:
        DataError: it is none.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(
                f"{where}: {place} is a string, but not JSON.", "Write it as a list of objects."
            ) from error
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{where}: {place} is not a list of objects.", "Write it as [{...}, {...}].")
    return value


def calls_of(where: str, value: Any, place: str) -> list[dict[str, Any]]:
    """Each call with its arguments as an object, also where the row has them as OpenAI's string of JSON.

    A template writes arguments as JSON: of a string it would make "{\\"city\\": ...}", escaped once more.

    Raises:
        DataError: no list of calls, or arguments that are no JSON object.
    """
    calls = objects_of(where, value, place)
    return [_with_object(where, call, f"{place}[{index}]") for index, call in enumerate(calls)]


def _with_object(where: str, call: dict[str, Any], place: str) -> dict[str, Any]:
    """Of {"function": {"name", "arguments"}}, or of {"name", "arguments"} as some write it."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_object(where, call["function"], f"{place}.function")}
    if not isinstance(call.get("arguments"), str):
        return call
    try:
        arguments = json.loads(call["arguments"])
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise DataError(
            f"{where}: {place}.arguments is a string, but not a JSON object: {call['arguments'][:60]!r}.",
            'Write the arguments as an object, {"city": "Paris"}; {} where there are none.',
        )
    return {**call, "arguments": arguments}


def with_written_arguments(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with each call's arguments as a string of JSON."""
    return [_with_string(call) for call in calls]


def _with_string(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_string(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, dict):
        return call
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
