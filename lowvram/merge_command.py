"""`lowvram merge`: finds the base and the adapter of a run, merges them, verifies, and says what came out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lowvram.engine.config import QUANTIZED
from lowvram.engine.model import DTYPES
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, StoppedError, refusals_of_the_system
from lowvram.export.merge import MergeResult, write_merged
from lowvram.export.merge_check import MergeCheck
from lowvram.export.merged_tensors import MergedTensors
from lowvram.export.model_card import (
    CARD_FILE,
    Contents,
    Training,
    adapter_settings,
    licence_of,
    model_card,
    title_of,
)
from lowvram.export.partial_folder import refuse_used
from lowvram.export.push import files_of, push, require_pushable, upload_command
from lowvram.export.quantized_output import write_quantized
from lowvram.export.quantized_values import values_as_trained
from lowvram.export.run_adapter import adapter_of, source_of
from lowvram.frozen import write_atomically
from lowvram.planner.plan import Plan
from lowvram.shell import typed
from lowvram.training.signals import Interrupted, stop_on_signal
from lowvram.units import format_bytes

Onto = Literal["base", "nf4", "int8"]
_CHECK = "Check the permissions and the path, or give another --output."
_NO_ROOM = "Free some room, or give an --output on another disk."


@dataclass(frozen=True)
class MergeWishes:
    """What may be asked of a merge."""

    onto: Onto = "base"  # the original weights, or their quantised values that the adapter was trained with
    quantized_base: bool = False
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    shard_bytes: int | None = None  # of a weight file: 4 GiB, in 4 bits 256 MiB, which are kept in memory
    verify: bool = True
    data: str | None = None  # rows to verify with, instead of the run's held-out ones
    push: str | None = None  # to this repository of the hub
    public: bool = False


@dataclass(frozen=True)
class _Merge:
    """One merge: all that is read and checked before the first byte is written."""

    run: Path
    adapter: Path
    training: Training | None
    tensors: MergedTensors
    target: Path
    wishes: MergeWishes
    check: MergeCheck | None
    licence: str | None

    @property
    def plan(self) -> Plan | None:
        return self.training.plan if self.training else None


def merge_run(
    run: Path,
    output: Path | None,
    console: Console,
    base: str | None = None,
    wishes: MergeWishes = MergeWishes(),  # frozen
    command: str | None = None,
) -> MergeResult:
    """Merge RUN/adapter (or an adapter folder) into its base model.

    Args:
        base: instead of the one that the adapter names.
        command: as the user typed it, whole.

    Raises:
        ConfigError: there is no adapter or no base, they do not belong together, the output is in use, or the
            hub will not take it.
        DoesNotFitError: too little disk.
        MergeError: what was written does not compute what it should; it is removed.
        StoppedError: a signal came; nothing is left behind.
    """
    if wishes.data is not None and not wishes.verify:
        raise ConfigError(
            "--data is what to verify with, and --no-verify is given.", "Leave one of them out."
        )
    target = output or run / ("merged-4bit" if wishes.quantized_base else "merged")
    what = f"'{run}' cannot be merged into '{target}', nothing was written"
    with refusals_of_the_system(what, _CHECK, _NO_ROOM):
        again = command or f"lowvram merge {typed(run)}"
        merge = _prepared(run, target, base, wishes, console, again)
        with _stoppable(again):
            result = _merged(merge, console)
    if wishes.push is not None:
        again = upload_command(wishes.push, target, public=wishes.public)
        console.print(f"Pushing to {escape(wishes.push)}", soft_wrap=True)
        url = push(files_of(target), wishes.push, public=wishes.public, again=again)
        console.print(f"Pushed: {escape(url)}", soft_wrap=True)
    return result


def _prepared(
    run: Path, target: Path, base: str | None, wishes: MergeWishes, console: Console, again: str
) -> _Merge:
    """Everything is read and refused here; what asks the hub comes after what is seen on this machine."""
    refuse_used(target)
    require_pushable(wishes.push, public=wishes.public)
    adapter, training = adapter_of(run), Training.of_run(run)
    plan = training.plan if training else None
    source = source_of(adapter, base, again)
    tensors = MergedTensors.open(ModelSource(source.name, plan.trust_remote_code if plan else False), adapter)
    _choose_values(tensors, plan, wishes)
    check = MergeCheck(tensors, adapter, plan, wishes.onto, wishes.data) if wishes.verify else None
    console.print(_needs(tensors, check), soft_wrap=True)
    return _Merge(run, adapter, training, tensors, target, wishes, check, licence_of(tensors.folder))


def _choose_values(tensors: MergedTensors, plan: Plan | None, wishes: MergeWishes) -> None:
    """Onto which values, and in which dtype."""
    if wishes.dtype is not None:
        tensors.stored_as(DTYPES[wishes.dtype])
    if wishes.onto == "base":
        return
    trained = plan.base_precision if plan else None
    if plan is None or trained != wishes.onto:
        why = f"was trained on a base in {trained}" if trained else "has no plan.yaml that says how it was"
        raise ConfigError(
            f"--onto {wishes.onto}: the adapter {why}.",
            f"Use --onto {trained if trained in QUANTIZED else 'base'}.",
        )
    tensors.merge_onto(values_as_trained(tensors, plan.step))


@contextmanager
def _stoppable(again: str) -> Iterator[None]:
    try:
        with stop_on_signal(lambda _: None):
            yield
    except Interrupted as interrupt:
        raise StoppedError(
            "Merging was stopped; nothing was written.",
            f"Start it again: {again}",
            interrupt.signal_number,
        ) from interrupt


def _merged(merge: _Merge, console: Console) -> MergeResult:
    """Written, verified and described, with a bar for each of the first two."""
    with _bar(console) as bar:
        written = bar.add_task("merging", total=None)
        options: dict[str, Any] = {
            "progress": lambda done, total: bar.update(written, completed=done, total=total),
            "check": lambda folder: _checked(merge, folder, bar),
        }
        result, told = _written(merge, options)
    verdict = merge.check.lines() if merge.check else ["Not verified: --no-verify."]
    for line in (*told, *verdict, _said(result)):
        console.print(escape(line), soft_wrap=True)
    return result


def _checked(merge: _Merge, folder: Path, bar: Progress) -> None:
    """The last that happens before the folder takes its name."""
    if merge.check is not None:
        task: TaskID = bar.add_task("verifying", total=None)
        merge.check.run(
            folder,
            lambda done, total: bar.update(task, completed=done, total=total),
            merge.wishes.quantized_base,
        )
    write_atomically(folder / CARD_FILE, model_card(_contents(merge), merge.training))


def _contents(merge: _Merge) -> Contents:
    base = merge.plan.model if merge.plan else merge.tensors.source.name
    values = {"base": "the original weights", "nf4": "the NF4 values", "int8": "the int8 values"}
    bits = ", then quantised to 4 bits (NF4)" if merge.wishes.quantized_base else ""
    return Contents(
        title=title_of(base, merge.run),
        what=f"A LoRA adapter, merged into {values[merge.wishes.onto]} of its base{bits}.",
        base_model=base,
        library="transformers",
        licence=merge.licence,
        settings=adapter_settings(merge.adapter),
        measured=tuple(merge.check.lines(for_others=True)) if merge.check else (),
    )


def _written(merge: _Merge, options: dict[str, Any]) -> tuple[MergeResult, tuple[str, ...]]:
    """The result, and what has to be said about it."""
    tensors, wishes = merge.tensors, merge.wishes
    if wishes.shard_bytes is not None:
        options["max_shard_bytes"] = wishes.shard_bytes
    if not wishes.quantized_base:
        return write_merged(tensors, merge.adapter, merge.target, **options), ()
    double = merge.plan.levers.double_quantization if merge.plan else True
    result, error = write_quantized(
        tensors, merge.adapter, merge.target, double_quantization=double, **options
    )
    return result, (
        f"Quantised once more to NF4: the linear layers' weights are {error.relative:.2%} off the merged.",
    )


def _needs(tensors: MergedTensors, check: MergeCheck | None) -> str:
    """Said before the work begins."""
    n_bytes = sum(map(tensors.n_bytes, tensors.names))
    verifying = (
        f", verifying about {format_bytes(check.working_bytes())} on the {check.place}" if check else ""
    )
    return (
        f"Merging needs about {format_bytes(tensors.working_bytes())} of host memory beyond the program"
        f"{verifying}; the merged tensors are {format_bytes(n_bytes)} in 16 or 32 bits."
    )


def _said(result: MergeResult) -> str:
    return (
        f"Merged {result.n_merged} of {result.n_tensors} tensors into {result.folder} "
        f"({format_bytes(result.n_bytes)}); plain transformers loads it."
    )


def _bar(console: Console) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console)
