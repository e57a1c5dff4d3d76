"""Sizes are read and written as people do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram.errors import ConfigError
from lowvram.units import GiB, MiB, format_bytes, format_count, format_seconds, parse_bytes, printable


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("8GB", 8 * GiB), ("8", 8 * GiB), ("7.5 GiB", int(7.5 * GiB)), ("800MB", 800 * MiB), ("8g", 8 * GiB)],
)
def test_parse_bytes(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "0GB", "-8GB", "eight", "8TBB", "nan"])
def test_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="not a memory size"):
        parse_bytes(text)


@given(st.integers(min_value=GiB, max_value=90 * GiB))
def test_format_and_parse_agree_within_a_hundredth(n_bytes: int) -> None:
    assert abs(parse_bytes(format_bytes(n_bytes)) - n_bytes) <= 0.006 * GiB


def test_formats() -> None:
    assert format_bytes(512) == "512 B"
    assert format_bytes(94 * MiB) == "94 MiB"
    assert format_count(7_620_000_000) == "7.62B"
    assert format_seconds(245) == "4 min 5 s"
    assert format_seconds(2.5) == "2.5 s"


def test_printable_keeps_text_and_takes_what_a_terminal_obeys() -> None:
    assert printable("né 😀\n[31m") == "né 😀\n[31m"
    assert printable("a\x1b[31m\x1b]0;title\x07\tb") == "a [31m ]0;title  b"
