"""Shows a plan in the terminal: verdict, memory by component, choices with their reasons."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lowvram.engine.config import StepConfig
from lowvram.planner.plan import Plan
from lowvram.units import format_bytes, format_count, format_seconds

_BAR_WIDTH = 34
_COLORS = ("blue", "cyan", "magenta", "green", "yellow", "red", "bright_blue", "bright_magenta", "bright_red")


def show_plan(plan: Plan, console: Console) -> None:
    """Print the plan."""
    console.print(
        Panel(
            Group(_head(plan), Text(), _memory(plan), Text(), _reasons(plan)),
            title="lowvram plan",
            title_align="left",
            border_style="green" if plan.fits else "red",
        )
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """The machine-readable plan; its keys are stable under semantic versioning."""
    device = plan.device.model_dump()
    device.pop("backend")
    step = plan.model_dump(mode="json", include=set(StepConfig.model_fields))
    schedule = ("learning_rate", "schedule", "warmup_steps", "total_steps", "seed", "n_trainable", "data")
    return {
        "fits": plan.fits,
        "model": plan.model,
        "device": device,
        "budget_bytes": plan.budget_bytes,
        "peak_allocated_bytes": plan.estimate.peak_allocated_bytes,
        "peak_reserved_bytes": plan.estimate.peak_reserved_bytes,
        "peak_moment": plan.estimate.peak_moment,
        "components_bytes": plan.estimate.components_bytes,
        "host_ram_bytes": plan.host_ram_bytes,
        "largest_seq_len": plan.largest_seq_len,
        "seconds_per_step": plan.seconds_per_step,
        "plan": step | {name: getattr(plan, name) for name in schedule},
        "reasons": list(plan.reasons),
    }


def _head(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    verdict = "[bold green]fits[/]" if plan.fits else "[bold red]does not fit[/]"
    free = plan.budget_bytes - plan.estimate.peak_reserved_bytes
    eta = plan.seconds_per_step * plan.total_steps
    table.add_row("model", f"{escape(plan.model)}, {format_count(plan.n_parameters)} parameters")
    table.add_row("device", f"{escape(plan.device.name)}, {format_bytes(plan.device.total_bytes)}")
    table.add_row("verdict", f"{verdict}, {format_bytes(free)} of the budget left")
    if plan.data:
        table.add_row("data", escape(plan.data))
        table.add_row("steps", f"{plan.total_steps}, about {format_seconds(eta)} (modelled)")
    table.add_row("adapter", f"{format_count(plan.n_trainable)} trainable parameters")
    table.add_row("longest context", f"{plan.largest_seq_len:,} tokens with all else as planned")
    return table


def _memory(plan: Plan) -> Table:
    estimate = plan.estimate
    table = Table(box=None, padding=(0, 1), title="Predicted memory at the peak", title_justify="left")
    table.add_column("component")
    table.add_column("", width=_BAR_WIDTH)
    table.add_column("bytes", justify="right")
    largest = max(estimate.components_bytes.values())
    for index, (name, n_bytes) in enumerate(estimate.components_bytes.items()):
        bar = "█" * max(1, round(_BAR_WIDTH * n_bytes / largest))
        color = _COLORS[index % len(_COLORS)]
        table.add_row(name.replace("_", " "), Text(bar, style=color), format_bytes(n_bytes))
    table.add_row("[bold]allocated", "", f"[bold]{format_bytes(estimate.peak_allocated_bytes)}")
    table.add_row("[bold]reserved", "", f"[bold]{format_bytes(estimate.peak_reserved_bytes)}")
    table.add_row("budget", _budget_note(plan), format_bytes(plan.budget_bytes))
    table.caption = f"peak: {escape(estimate.peak_moment)}"
    table.caption_justify = "left"
    return table


def _budget_note(plan: Plan) -> str:
    if plan.device.backend == "cpu":
        return "[dim]free host memory - margin"
    held, context = format_bytes(plan.device.held_bytes), format_bytes(plan.device.context_bytes)
    return f"[dim]card - {context} context - {held} held"


def _reasons(plan: Plan) -> Text:
    return Text("\n".join(f"• {reason}" for reason in plan.reasons))
