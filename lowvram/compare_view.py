"""Shows the plans of several models side by side; a refusal is a column like the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowvram.errors import ConfigError, LowvramError
from lowvram.plan_view import plan_json
from lowvram.planner.survey import tokens_said
from lowvram.planning import Planned, needs_on_disk
from lowvram.survey_view import survey_json
from lowvram.units import GiB, format_bytes, format_count, format_seconds, printable

_MOST = 4  # columns that a terminal of usual width can show
_NOTHING = "[dim]-[/]"
_Tell = Callable[[Planned], str]


@dataclass(frozen=True)
class Column:
    """One model of a comparison."""

    model: str  # as it was typed
    outcome: Planned | LowvramError

    @property
    def planned(self) -> Planned | None:
        return self.outcome if isinstance(self.outcome, Planned) else None

    @property
    def refusal(self) -> LowvramError | None:
        return self.outcome if isinstance(self.outcome, LowvramError) else None

    def as_json(self) -> dict[str, Any]:
        """The object that `plan --json` prints for this model alone."""
        if isinstance(self.outcome, Planned):
            return plan_json(self.outcome.plan) | survey_json(self.outcome)
        told = {"message": self.outcome.message, "nearest": self.outcome.remedy}
        return {"fits": False, "model": self.model, **told}


def require_comparable(models: list[str], files: dict[str, Path]) -> None:
    """Refuse, before anything is traced, models and files (by their flags) that do not go together.

    Raises:
        ConfigError: too many models, or files that could not hold what was asked.
    """
    if len(models) > _MOST:
        raise ConfigError(
            f"{len(models)} models were given; a table holds {_MOST}.", "Compare them in two commands."
        )
    if len(models) > 1 and files:
        raise ConfigError(
            f"{' and '.join(files)} saves one plan, and {len(models)} models were given.",
            "Leave it out to compare them, or give the one --model whose plan to save.",
        )
    if len({path.absolute() for path in files.values()}) < len(files):
        raise ConfigError(f"{' and '.join(files)} name the same file.", "Give each a file of its own.")


def show_comparison(columns: list[Column], console: Console) -> None:
    """Print a column for each model."""
    table = Table(title="lowvram plan, side by side", title_justify="left", padding=(0, 1))
    table.add_column("", style="dim", no_wrap=True)
    for name in _short_names(columns):
        table.add_column(escape(printable(name)), overflow="fold", ratio=1)
    table.add_row("verdict", *map(_verdict, columns))
    for label, tell in _ROWS.items():
        table.add_row(label, *(tell(c.planned) if c.planned else _NOTHING for c in columns))
    for label, cells in _card_rows(columns):
        table.add_row(label, *cells)
    if any(column.refusal for column in columns):
        table.add_section()
        table.add_row("why not", *(_said(c.refusal.message if c.refusal else "") for c in columns))
        table.add_row("nearest plan", *(_said(c.refusal.remedy if c.refusal else "") for c in columns))
    console.print(table)


def _short_names(columns: list[Column]) -> list[str]:
    """Last parts of the names where they tell the models apart."""
    short = [Path(column.model).name for column in columns]
    return short if len(set(short)) == len(short) else [column.model for column in columns]


def _verdict(column: Column) -> str:
    if column.planned is None or not column.planned.plan.fits:
        return "[bold red]does not fit[/]"
    plan = column.planned.plan
    left = plan.budget_bytes - plan.estimate.peak_reserved_bytes
    return f"[bold green]fits[/], {format_bytes(left)} left"


def _said(text: str) -> str:
    return escape(printable(text))


def _card_rows(columns: list[Column]) -> Iterator[tuple[str, list[str]]]:
    """The longest context of each model on each card."""
    found = [dict(_longest(column)) for column in columns]
    for size in sorted({size for sizes in found for size in sizes}):
        cells = [sizes.get(size, _NOTHING) for sizes in found]
        yield f"longest on {size / GiB:.3g} GB", cells


def _longest(column: Column) -> Iterator[tuple[int, str]]:
    survey = column.planned.survey if column.planned else None
    if survey is None:
        return
    for card in survey.cards:
        said = tokens_said(card, survey)
        yield card.total_bytes, said if said == "none" else f"{said} tokens"


def _tokens(n: int) -> str:
    return f"{n:,} tokens" if n else "none"


def _download(planned: Planned) -> str:
    n_bytes = needs_on_disk(planned)[0]
    if n_bytes is None:
        return "unknown"
    return format_bytes(n_bytes) if n_bytes else "nothing, it is here"


_ROWS: dict[str, _Tell] = {
    "parameters": lambda p: format_count(p.plan.n_parameters),
    "reserved peak": lambda p: format_bytes(p.plan.estimate.peak_reserved_bytes),
    "planned for": lambda p: f"{p.plan.seq_len:,} tokens, {p.plan.base_precision}",
    "longest context": lambda p: _tokens(p.plan.largest_seq_len),
    "a step, modelled": lambda p: format_seconds(p.plan.seconds_per_step),
    "trainable": lambda p: f"{format_count(p.plan.n_trainable)}, rank {p.plan.rank}",
    "download": _download,
    "host memory": lambda p: format_bytes(p.plan.host_ram_bytes),
}
