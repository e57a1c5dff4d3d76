"""What the benchmarks of steps have in common: which machine it was, ratios round by round, the CSV file."""

from __future__ import annotations

import csv
import os
import platform
import statistics
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def here(*packages: str) -> dict[str, Any]:
    """Columns that say where and when a row was made, and with which versions."""
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        **{package: version(package) for package in packages},
    }


def medians(seconds: list[list[float]]) -> tuple[float, float]:
    """Of each of the two columns [first, second]."""
    first, second = (round(statistics.median(column), 3) for column in zip(*seconds, strict=True))
    return first, second


def ratios(seconds: list[list[float]]) -> dict[str, Any]:
    """Columns that compare the second with the first, round by round."""
    found = [second / first for first, second in seconds]
    return {
        "rounds": len(found),
        "ratio": round(statistics.median(found), 3),
        "lowest_ratio": round(min(found), 3),
        "highest_ratio": round(max(found), 3),
    }


def write(records: list[dict[str, Any]], path: Path) -> None:
    """The whole table, after each row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def read(path: Path) -> list[dict[str, Any]]:
    """The table as it is; no rows before it was written for the first time."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
