"""Arrow rows: a table's rows without the nulls that Arrow puts where a row lacks a field of another row."""

from __future__ import annotations

from typing import Any

_OBJECTS = ("tools", "tool_calls")  # whose fields differ by row: {"city": 1} here, {"zip": 2} there


def without_filled(value: Any) -> Any:
    """The same without null fields below tools and calls of tools, at any depth.

    A column of objects has one list of fields, so a call with {"zip": "1"} comes back as {"zip": "1",
    "city": None}, which a chat template would show and the model would learn to write. A null that somebody
    wrote there is lost too: Arrow does not tell them apart. Items of lists are nobody's filling and stay.
    """
    if isinstance(value, dict):
        return {k: _without_nulls(v) if k in _OBJECTS else without_filled(v) for k, v in value.items()}
    return [without_filled(item) for item in value] if isinstance(value, list) else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
