"""Shows a plan's neighbourhood: which card holds which context, other methods, disk and host memory."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lowvram.planner.plan import Plan
from lowvram.planner.survey import Survey, tokens_said
from lowvram.planning import Planned, needs_on_disk
from lowvram.units import GiB, format_bytes

_UNKNOWN = "unknown: the hub is not reachable"


def show_survey(planned: Planned, console: Console) -> None:
    """Print what else would fit."""
    assert planned.survey is not None
    body = Group(
        _cards(planned.survey), Text(), _methods(planned.plan, planned.survey), Text(), _needs(planned)
    )
    console.print(Panel(body, title="what else fits", title_align="left", border_style="dim"))


def survey_json(planned: Planned) -> dict[str, Any]:
    """The machine-readable neighbourhood; `{}` when none was asked for."""
    if planned.survey is None:
        return {}
    download_bytes, run_bytes = needs_on_disk(planned)
    disk = {"download_bytes": download_bytes, "run_folder_bytes": run_bytes}
    return {"survey": planned.survey.model_dump(mode="json") | disk}


def _cards(survey: Survey) -> Table:
    """Rows are contexts, columns are cards; one sequence at a time with every lever that saves memory."""
    table = Table(box=None, padding=(0, 1), title_justify="left")
    table.title = "Context by card, one sequence at a time, every memory lever on"
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("needs", justify="right", no_wrap=True)
    for card in survey.cards:
        table.add_column(f"{card.total_bytes / GiB:.3g} GB", justify="center", no_wrap=True)
    budgets = [card.budget_bytes for card in survey.cards]
    for need in survey.lengths:
        marks = ["[green]yes[/]" if need.reserved_bytes <= b else "[red]no[/]" for b in budgets]
        about = "" if need.traced else "[dim]≤ [/]"
        table.add_row(f"{need.seq_len:,}", about + format_bytes(need.reserved_bytes), *marks)
    largest = (tokens_said(card, survey) for card in survey.cards)
    table.add_row("[bold]longest", "", *largest)
    return table


def _methods(plan: Plan, survey: Survey) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    if survey.full_fine_tuning_bytes is not None:
        size = format_bytes(survey.full_fine_tuning_bytes)
        table.add_row("full fine-tuning", size, "all weights, 16-bit, AdamW, recompute")
    table.add_row("LoRA, 16-bit", format_bytes(survey.lora_16bit_bytes), "this plan over a 16-bit base")
    table.add_row("this plan", format_bytes(plan.estimate.peak_reserved_bytes), f"rank {plan.rank}")
    how = "all layers recomputed" if plan.levers.kept_layers else "all else as planned"
    table.add_row("largest rank", str(survey.largest_rank), f"doubling the plan's, {how}")
    return table


def _needs(planned: Planned) -> Table:
    download_bytes, run_bytes = needs_on_disk(planned)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    size = _UNKNOWN if download_bytes is None else format_bytes(download_bytes)
    table.add_row("download", "nothing, it is here" if download_bytes == 0 else size)
    table.add_row("disk for the run", format_bytes(run_bytes))
    table.add_row("host memory", format_bytes(planned.plan.host_ram_bytes))
    return table
