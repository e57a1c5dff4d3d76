"""Shows a plan in the terminal: verdict, memory by component, choices with their reasons."""

from __future__ import annotations

from collections.abc import Iterator
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
_SMALLEST_BAR = 12  # narrower, the note on the budget beside the bars would be a word a line
_AROUND = 10  # columns of the panel's frame and of the table's padding
_COLORS = ("blue", "cyan", "magenta", "green", "yellow", "red", "bright_blue", "bright_magenta", "bright_red")


def show_plan(plan: Plan, console: Console) -> None:
    """Print the plan."""
    console.print(
        Panel(
            Group(_head(plan), Text(), _memory(plan, console.width), Text(), _reasons(plan)),
            title="lowvram plan",
            title_align="left",
            border_style="green" if plan.fits else "red",
        )
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """The machine-readable plan; its keys are stable under semantic versioning."""
    device = plan.device.model_dump()
    device.pop("backend")
    device.pop("capability")
    step = plan.model_dump(mode="json", include=set(StepConfig.model_fields))
    schedule = ["learning_rate", "schedule", "warmup_steps", "total_steps", "seed", "n_trainable", "data"]
    schedule += ["eval_data", "early_stop", "keep_checkpoints"]
    return {
        "fits": plan.fits,
        "model": plan.model,
        "device": device,
        "budget_bytes": plan.budget_bytes,
        "peak_allocated_bytes": plan.estimate.peak_allocated_bytes,
        "peak_reserved_bytes": plan.estimate.peak_reserved_bytes,
        "fragmentation_bytes": _fragmentation_bytes(plan),
        "phases_bytes": plan.estimate.phases_bytes,
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
    table.add_row("model", f"{escape(plan.model)}, {format_count(plan.n_parameters)} parameters")
    table.add_row("device", f"{escape(plan.device.name)}, {format_bytes(plan.device.total_bytes)}")
    table.add_row("verdict", f"{verdict}, {format_bytes(free)} of the budget left")
    if plan.data:
        table.add_row("data", escape(plan.data))
        table.add_row("steps", f"{plan.total_steps}, about {format_seconds(plan.seconds_in_all)} (modelled)")
    table.add_row("adapter", f"{format_count(plan.n_trainable)} trainable parameters")
    table.add_row("longest context", plan.longest_context)
    return table


def _memory(plan: Plan, width: int) -> Table:
    """Names, bars and numbers; a narrow console gets no bars, and the budget's note below the table."""
    bar_width = _bar_width(plan, width)
    table = Table(box=None, padding=(0, 1), title="Predicted memory at the peak", title_justify="left")
    table.add_column("component", no_wrap=True)
    if bar_width:
        table.add_column("", width=bar_width)
    table.add_column("bytes", justify="right", no_wrap=True)
    for name, bar, n_bytes in _rows(plan, bar_width):
        table.add_row(name, *([bar] if bar_width else []), n_bytes)
    note = "" if bar_width else f"budget: {_budget_note(plan)}\n"
    table.caption = f"{note}peak: {escape(plan.estimate.peak_moment)}"
    table.caption_justify = "left"
    return table


def _rows(plan: Plan, bar_width: int) -> Iterator[tuple[str, Text | str, str]]:
    estimate = plan.estimate
    largest = max(estimate.components_bytes.values())
    for index, (name, n_bytes) in enumerate(estimate.components_bytes.items()):
        bar = Text("█" * max(1, round(bar_width * n_bytes / largest)), style=_COLORS[index % len(_COLORS)])
        yield name.replace("_", " "), bar, format_bytes(n_bytes)
    yield "[bold]allocated", "", f"[bold]{format_bytes(estimate.peak_allocated_bytes)}"
    yield "fragmentation", "[dim]kept between blocks", format_bytes(_fragmentation_bytes(plan))
    yield "[bold]reserved", "", f"[bold]{format_bytes(estimate.peak_reserved_bytes)}"
    yield "budget", f"[dim]{_budget_note(plan)}", format_bytes(plan.budget_bytes)


def _fragmentation_bytes(plan: Plan) -> int:
    """What the allocator holds beyond what is allocated at the peak."""
    return plan.estimate.peak_reserved_bytes - plan.estimate.peak_allocated_bytes


def _bar_width(plan: Plan, width: int) -> int:
    """What names and numbers leave of the console; 0 when that is too little for bars."""
    numbers = (*plan.estimate.components_bytes.values(), plan.estimate.peak_reserved_bytes, plan.budget_bytes)
    used = max(map(len, plan.estimate.components_bytes)) + max(len(format_bytes(n)) for n in numbers)
    left = min(_BAR_WIDTH, width - used - _AROUND)
    return left if left >= _SMALLEST_BAR else 0


def _budget_note(plan: Plan) -> str:
    if plan.device.backend == "cpu":
        return "free host memory - margin"
    held, context = format_bytes(plan.device.held_bytes), format_bytes(plan.device.context_bytes)
    return f"card - {context} context - {held} held"


def _reasons(plan: Plan) -> Text:
    return Text("\n".join(f"• {reason}" for reason in plan.reasons))
