"""`lowvram merge`: finds the base and the adapter of a run and merges them with a progress bar."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.merge import MergeResult, merge_adapter
from lowvram.units import format_bytes


def merge_run(run: Path, output: Path | None, console: Console) -> MergeResult:
    """Merge RUN/adapter (or an adapter folder) into its base model.

    Raises:
        ConfigError: there is no adapter, or the output is in use.
        DoesNotFitError: too little disk.
    """
    adapter = run if (run / "adapter_config.json").is_file() else run / "adapter"
    config_file = adapter / "adapter_config.json"
    if not config_file.is_file():
        raise ConfigError(
            f"'{run}' holds no finished adapter.",
            f"Finish it first: lowvram resume {run}, or check the path.",
        )
    base = json.loads(config_file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ConfigError(
            f"{config_file} does not name its base model.", "Add base_model_name_or_path to it."
        )
    target = output or run / "merged"
    with Progress(TextColumn("merging"), BarColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("merging", total=None)
        result = merge_adapter(
            ModelSource(base),
            adapter,
            target,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(
        f"Merged {result.n_merged} of {result.n_tensors} tensors into {escape(str(target))} "
        f"({format_bytes(result.n_bytes)}); plain transformers loads it.",
        soft_wrap=True,
    )
    return result
