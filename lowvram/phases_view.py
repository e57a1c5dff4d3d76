"""Predicted and measured memory of a run, phase by phase, on the screen."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowvram.memory.receipt import PhaseMemory, Receipt
from lowvram.units import format_bytes

_MEASURED = {"allocated": "tensors", "reserved": "reserved", "driver": "driver", "resident": "process"}


def show_phases(receipt_file: Path, console: Console) -> None:
    """The table of a finished run; nothing where it left no receipt that can be read."""
    try:
        receipt = Receipt.model_validate_json(receipt_file.read_bytes())
    except (OSError, ValueError):
        return
    console.print(phases_table(receipt))


def phases_table(receipt: Receipt) -> Table:
    """One row a phase. On a GPU predicted and `tensors` are about the same; on a CPU only the whole process
    is measured, which also holds what Python and the libraries take while training."""
    phases = {name: memory for name, memory in receipt.phases.items() if name != "other"}
    shown = [kind for kind in _MEASURED if any(_of(m, kind) is not None for m in phases.values())]
    table = Table(box=None, padding=(0, 2), title="memory by phase", title_style="dim", title_justify="left")
    table.add_column("phase", style="dim")
    for heading in ("predicted", *(f"{_MEASURED[kind]} measured" for kind in shown)):
        table.add_column(heading, justify="right")
    for name, memory in phases.items():
        measured = [_shown(_of(memory, kind)) for kind in shown]
        table.add_row(name, _shown(memory.predicted_allocated_bytes), *measured)
    return table


def _of(memory: PhaseMemory, kind: str) -> int | None:
    value: int | None = getattr(memory, f"measured_{kind}_bytes")
    return value


def _shown(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else format_bytes(n_bytes)
