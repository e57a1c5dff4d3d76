"""Units: bytes, counts, durations, settings and foreign text as people read and write them."""

from __future__ import annotations

import re
from typing import Any

from lowvram.errors import ConfigError

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(gib|gb|g|mib|mb|m)?\s*$", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `8GB`, `7.5GiB`, `800MB` or a bare number of GiB.

    A card sold as "8 GB" has 8 GiB, so GB and GiB both mean GiB here.

    Raises:
        ConfigError: the text is no size, or zero.
    """
    match = _SIZE.match(text)
    unit = MiB if match and (match.group(2) or "g").lower().startswith("m") else GiB
    size = int(float(match.group(1)) * unit) if match else 0
    if size <= 0:
        raise ConfigError(f"'{text}' is not a memory size.", "Write it like 8GB, 7.5GB or 800MB.")
    return size


def format_bytes(n: int) -> str:
    """`n` bytes with a binary unit and three figures: 5.52 GiB, 94 MiB, 512 B."""
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if abs(n) >= unit:
            value = n / unit
            return f"{value:.2f} {name}" if unit == GiB and abs(value) < 100 else f"{value:.0f} {name}"
    return f"{n} B"


def format_count(n: float) -> str:
    """A count with a metric suffix: 7.62B, 135M, 4.9k, 12."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= unit:
            return f"{n / unit:.3g}{name}"
    return f"{n:g}"


def format_seconds(s: float) -> str:
    """A duration in its two largest units: 3 h 12 min, 4 min 5 s, 2.5 s."""
    if s < 60:
        return f"{s:.1f} s" if s < 10 else f"{s:.0f} s"
    if s < 3600:
        return f"{int(s // 60)} min {int(s % 60)} s"
    if s < 48 * 3600:
        return f"{int(s // 3600)} h {int(s % 3600 // 60)} min"
    return f"{s / 86400:.1f} days"


def said(value: Any) -> str:
    """A setting as it is typed."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def printable(text: str) -> str:
    """`text` without what a terminal would obey: data, a path or an error may carry escape sequences."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)
