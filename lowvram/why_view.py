"""Shows why each lever of a plan is as it is: what it saves, what it costs, what would flip it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from lowvram.planner.why import LeverWhy
from lowvram.units import format_bytes


def show_why(levers: tuple[LeverWhy, ...], console: Console) -> None:
    """Print one row for each lever."""
    table = Table(box=None, padding=(0, 1))
    for name in ("lever", "is", "beside"):
        table.add_column(name, overflow="fold")
    table.add_column("memory", justify="right")
    table.add_column("time", justify="right")
    table.add_column("flips to", overflow="fold")
    for one in levers:
        table.add_row(*map(escape, _row(one)))
    table.caption = "memory: traced, and time: modelled, of what it is over what is beside it"
    table.caption_justify = "left"
    console.print(Panel(table, title="why", title_align="left", border_style="dim"))


def why_json(levers: tuple[LeverWhy, ...] | None) -> dict[str, Any]:
    """The machine-readable rows; `{}` when none were asked for."""
    return {} if levers is None else {"why": [one.model_dump() for one in levers]}


def _row(one: LeverWhy) -> tuple[str, ...]:
    if one.saves_bytes is None or one.costs_share is None:
        return one.name, one.setting, "", "", "", one.flips
    sign = "+" if one.saves_bytes < 0 else "-"
    memory = "same" if not one.saves_bytes else f"{sign}{format_bytes(abs(one.saves_bytes))}"
    return one.name, one.setting, one.beside or "", memory, f"{one.costs_share:+.1%}", one.flips
