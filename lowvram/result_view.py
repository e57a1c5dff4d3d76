"""Shows what a finished run achieved and what to type next."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowvram.phases_view import show_phases
from lowvram.shell import typed
from lowvram.training.result import RunResult
from lowvram.units import format_bytes, format_count, format_seconds


def show_result(result: RunResult, folder: Path, console: Console) -> None:
    """Print losses before and after, speed, the adapter's place and the next commands."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    before, after = result.held_out_loss_before, result.held_out_loss_after
    table.add_row("held-out loss", f"{before:.4f} before, [bold]{after:.4f}[/] after ({_change(result)})")
    if result.held_out_perplexity_before is not None and result.held_out_perplexity_after is not None:
        before, after = result.held_out_perplexity_before, result.held_out_perplexity_after
        table.add_row("perplexity", f"{before:.4g} before, {after:.4g} after")
    table.add_row("trained", f"{result.steps} steps, {format_count(result.tokens)} tokens")
    table.add_row("time", f"{format_seconds(result.seconds)}, {result.tokens_per_second:.0f} tokens/s")
    if result.stop_reason != "finished":
        table.add_row("stopped", result.stop_reason)
    of_step = "" if result.adapter_step in (None, result.steps) else f", of step {result.adapter_step}"
    size = format_bytes(result.adapter_bytes)
    table.add_row("adapter", f"{escape(str(folder / 'adapter'))} ({size}{of_step})")
    console.print(table)
    show_phases(folder / "receipt.json", console)
    run = escape(typed(folder))
    console.print(
        f"Next: lowvram chat {run}, lowvram merge {run} or lowvram export {run} --to gguf", soft_wrap=True
    )


def _change(result: RunResult) -> str:
    if result.improvement is None:
        return "on other examples: the data changed"
    return f"{100 * result.improvement:.1f} % lower" if result.improvement > 0 else "not lower"
