"""`lowvram merge`: finds the base and the adapter of a run and merges them with a progress bar."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, StoppedError, refusals_of_the_system
from lowvram.export.merge import MergeResult, merge_adapter, read_adapter_config
from lowvram.training.signals import Interrupted, stop_on_signal
from lowvram.units import format_bytes

_CHECK = "Check the permissions and the path, or give another --output."
_NO_ROOM = "Free some room, or give an --output on another disk."


def merge_run(run: Path, output: Path | None, console: Console, base: str | None = None) -> MergeResult:
    """Merge RUN/adapter (or an adapter folder) into its base model.

    Args:
        base: instead of the one that the adapter names.

    Raises:
        ConfigError: there is no adapter or no base, or the output is in use.
        DoesNotFitError: too little disk.
        StoppedError: a signal came; nothing is left behind.
    """
    target = output or run / "merged"
    what = f"'{run}' cannot be merged into '{target}', nothing was written"
    with refusals_of_the_system(what, _CHECK, _NO_ROOM):
        adapter = _adapter_of(run)
        source = ModelSource(base or _base_of(adapter))
        if base is None and Path(source.name).is_absolute() and not source.is_local:
            raise ConfigError(
                f"The base model's folder '{source.name}' is gone.",
                f"Say where it is now: lowvram merge {run} --base PATH",
            )
        result = _merge_with_progress(source, adapter, target, run, console)
    console.print(
        f"Merged {result.n_merged} of {result.n_tensors} tensors into {escape(str(target))} "
        f"({format_bytes(result.n_bytes)}); plain transformers loads it.",
        soft_wrap=True,
    )
    return result


def _adapter_of(run: Path) -> Path:
    adapter = run if (run / "adapter_config.json").is_file() else run / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(
            f"'{run}' holds no finished adapter.",
            f"Finish it first: lowvram resume {run}, or check the path.",
        )
    return adapter


def _base_of(adapter: Path) -> str:
    name = read_adapter_config(adapter).get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"The adapter in {adapter} does not name its base model.", "Give it: --base PATH")
    return str(name)


def _merge_with_progress(
    source: ModelSource, adapter: Path, target: Path, run: Path, console: Console
) -> MergeResult:
    bar = Progress(TextColumn("merging"), BarColumn(), TimeRemainingColumn(), console=console)
    try:
        with stop_on_signal(lambda _: None), bar:
            task = bar.add_task("merging", total=None)
            return merge_adapter(
                source,
                adapter,
                target,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except Interrupted as interrupt:
        raise StoppedError(
            "Merging was stopped; nothing was written.",
            f"Start it again: lowvram merge {run}",
            interrupt.signal_number,
        ) from interrupt
