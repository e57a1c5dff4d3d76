"""Pipeline: the stages of `auto`, `train`, `resume` and `demo` in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from lowvram import hardware as machine
from lowvram.data.work_force import progress_line
from lowvram.device_rates import known_rates
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, refusals_of_the_system
from lowvram.frozen import write_atomically
from lowvram.hardware import Hardware
from lowvram.planner.plan import Plan, PlannedDevice
from lowvram.planner.recheck import checked as check_plan
from lowvram.planning import RUN_FILES_BYTES, Planned, anywhere, run_bytes
from lowvram.shell import typed
from lowvram.training.data import PreparedData, prepare, require_planned_data
from lowvram.training.live import make_view
from lowvram.training.loop import train
from lowvram.training.plan_changes import Known, changes, counts, known_of, refuse_changes, refuse_shorter
from lowvram.training.result import RunResult
from lowvram.training.resuming import require_whole
from lowvram.training.run import Run
from lowvram.training.run_folder import RunFolder, require_disk

if TYPE_CHECKING:
    from collections.abc import Iterable

Hook = Callable[[Run], None]
NO_TRACKER = "none"  # as --log-with, not even the plan's


def preflight(
    source: ModelSource, output: Path, log_with: Iterable[str] = (), inference_mode: bool = False
) -> None:
    """Refuse before the search what would be refused after it, as far as that needs no plan.

    Raises:
        ConfigError: nothing is to train, the model is not whole, the output is in use or unwritable, or a
            tracker is missing.
        DoesNotFitError: too little disk for the download or for any run.
    """
    _require_training(inference_mode)
    require_trackers(_trackers(log_with))
    source.require_weights()
    RunFolder.refuse_used(output)
    require_disk(output, RUN_FILES_BYTES)
    _require_download_room(source)


def require_here(wanted: Hardware | PlannedDevice, remedy: str) -> None:
    """A plan for another device may be looked at anywhere and trained only where such a device is.

    Raises:
        ConfigError: this machine trains on something else.
    """
    here = machine.probe(trial=False)
    if here.backend != wanted.backend:
        raise ConfigError(
            f"The plan is for {wanted.name} ({wanted.backend}); this machine trains on {here.backend}.",
            remedy,
        )


def from_saved(plan: Plan, again: str) -> Planned:
    """A saved plan with its model and data, read after the checks that need neither.

    Args:
        again: the command to type when what is missing is back.

    Raises:
        ConfigError: no data, another device, or a model that is not there or not whole.
        DataError: the data cannot be used.
    """
    _require_training(plan.inference_mode)
    if plan.data is None:
        raise ConfigError(
            "The plan names no data.", "Restore its data: line, or make a plan with --data FILE."
        )
    require_here(
        plan.device,
        f"Continue where such a device is, or plan for this machine: "
        f"lowvram auto --model {typed(plan.model)} --data {typed(plan.data)}",
    )
    source = ModelSource(plan.model, plan.trust_remote_code)
    if Path(plan.model).is_absolute() and not source.is_local:
        raise ConfigError(
            f"The model's folder '{plan.model}' is gone.", f"Move it back or link to it, then: {again}"
        )
    source.require_weights()
    return Planned(source, plan, _prepared(plan, plan.data, source))


def _prepared(plan: Plan, data: str, source: ModelSource) -> PreparedData:
    """As the plan says that it is read."""
    with Console(stderr=True).status("reading the data") as status:
        return prepare(
            data,
            source,
            plan.held_out_share,
            plan.reading,
            lambda done, left: status.update(escape(progress_line(data, done, left))),
            plan.eval_data,
        )


def _tell_skipped(prepared: PreparedData | None, folder: Path, console: Console) -> None:
    """The whole list into the run's folder, as long as it may be; how many, on the screen."""
    if prepared is None or not prepared.stats.n_skipped:
        return
    file = folder / "skipped_rows.txt"
    with refusals_of_the_system(f"{file} cannot be written", "Give another --output."):
        write_atomically(file, "".join(f"{line}\n" for line in prepared.skipped()))
    console.print(f"{prepared.stats.n_skipped} rows are skipped; which and why: {escape(str(file))}")


def checked(planned: Planned) -> Planned:
    """A saved plan that may have been edited, predicted anew.

    Raises:
        ConfigError, DoesNotFitError: it cannot run as it is.
    """
    here, stats = machine.probe(trial=False), planned.prepared.stats if planned.prepared else None
    plan = check_plan(planned.plan, planned.source, here, stats, known_rates(here))
    return replace(planned, plan=plan)


def start(
    planned: Planned,
    output: Path,
    console: Console,
    log_with: Iterable[str] = (),
    before: Hook = lambda _: None,
    after: Hook = lambda _: None,
) -> RunResult:
    """Create the run folder, save the plan, train.

    Args:
        log_with: trackers instead of the plan's; "none" alone: without any.

    Raises:
        ConfigError: the folder holds a run already, or the data is not what was planned.
        DoesNotFitError: too little disk.
    """
    planned = _logged(planned, log_with)
    preflight(planned.source, output, planned.plan.log_with, planned.plan.inference_mode)
    planned = replace(planned, plan=anywhere(planned.plan, planned.source))
    if planned.prepared is not None:
        require_planned_data(planned.plan, planned.prepared.stats)
    require_disk(output, run_bytes(planned.plan))
    folder = RunFolder.create(output)
    with refusals_of_the_system(f"{folder.plan_file} cannot be written", "Give another --output."):
        write_atomically(folder.plan_file, planned.plan.to_yaml())
    _tell_skipped(planned.prepared, folder.path, console)
    return _train(planned, folder, console, before, after)


def _logged(planned: Planned, log_with: Iterable[str]) -> Planned:
    """The run's plan keeps its trackers, for a resume."""
    update = {"log_with": _trackers(log_with, planned.plan)}
    return replace(planned, plan=planned.plan.model_copy(update=update))


def _trackers(asked: Iterable[str], plan: Plan | None = None) -> tuple[str, ...]:
    """Those asked for, which may be none at all, or else the plan's."""
    names = tuple(asked)
    if NO_TRACKER in names and len(names) > 1:
        raise ConfigError(
            f"--log-with {NO_TRACKER} stands beside {len(names) - 1} more --log-with.",
            f"Leave out --log-with {NO_TRACKER}, or all others.",
        )
    if names:
        return () if names == (NO_TRACKER,) else names
    return plan.log_with if plan is not None else ()


def _require_training(inference_mode: bool) -> None:
    if inference_mode:
        raise ConfigError(
            "Inference mode: the adapter is only used, so there is nothing to train.",
            "See the plan with lowvram plan, or leave --inference-mode (in a plan: inference_mode) out.",
        )


def _require_download_room(source: ModelSource) -> None:
    """Refuse a model whose weights the disk with the hub's cache cannot take, before they are fetched."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if needed := source.download_bytes():
        require_disk(Path(HF_HUB_CACHE), needed, f"Downloading {source.name}", "set HF_HOME to another disk")


def resume(
    run: Path,
    console: Console,
    log_with: Iterable[str] = (),
    before: Hook = lambda _: None,
    after: Hook = lambda _: None,
    force: bool = False,
    planned_levers: bool = False,
) -> RunResult:
    """Continue a run from its newest whole checkpoint; a finished run is left as it is.

    Args:
        log_with: trackers from now on, instead of those that the run began with; "none" alone: without any.
        force: go on although plan or data are not what they were at that checkpoint, or begin again where no
            checkpoint can be used.
        planned_levers: go back up all rungs that were taken when memory ran out.

    Raises:
        ConfigError: no run there, it is finished already, or it changed or lost its checkpoints and `force`
            is off or cannot help.
        DoesNotFitError: the changed plan.
    """
    folder = RunFolder.open(run)
    folder.require_sound()
    if folder.finished():
        raise ConfigError(f"The run in {run} is finished.", f"Merge it with: lowvram merge {typed(run)}")
    newest, _ = require_whole(folder, start_over=force)
    saved = Plan.from_yaml(folder.plan_file)
    known = known_of(newest, folder, saved)
    require_trackers(_trackers(log_with, saved))
    planned = _logged(from_saved(saved, f"lowvram resume {typed(run)}"), log_with)
    agreed = _agreed(planned, folder, known, force)
    return _train(agreed, folder, console, before, after, planned_levers, force)


def _agreed(planned: Planned, folder: RunFolder, known: Known, force: bool) -> Planned:
    """As it was at the newest checkpoint, or changed as the user wants it and predicted anew."""
    assert planned.prepared is not None
    stats = planned.prepared.stats
    hashes = {"data_sha256": stats.sha256, "eval_data_sha256": stats.eval_sha256}
    plan = planned.plan.model_copy(update=hashes)
    found = changes(known, plan, counts(planned.prepared))
    refuse_shorter(folder.path, known, plan)  # first: no --force helps
    refuse_changes(folder.path, known, found, force)
    return checked(replace(planned, plan=plan)) if found else planned


def _train(
    planned: Planned,
    folder: RunFolder,
    console: Console,
    before: Hook,
    after: Hook,
    planned_levers: bool = False,
    start_over: bool = False,
) -> RunResult:
    if planned.prepared is None:
        raise ConfigError("This plan names no data.", "Make one with lowvram plan --data FILE.")
    title = f"{Path(planned.plan.model).name} on {Path(str(planned.plan.data)).name}"
    return train(
        planned.plan,
        folder,
        planned.source,
        planned.prepared,
        make_view(console, title),
        before,
        after,
        planned_levers,
        start_over,
    )


def require_trackers(names: Iterable[str]) -> None:
    """Refuse a tracker that accelerate does not know or whose package is missing, before anything is loaded.

    Raises:
        ConfigError: names the package.
    """
    names = list(names)
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(t) for t in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join((*sorted(LOGGER_TYPE_TO_CLASS), NO_TRACKER))
            raise ConfigError(f"accelerate knows no tracker '{name}'.", f"Use one of {known}.")
        if name not in available:
            raise ConfigError(
                f"The tracker '{name}' is not installed.",
                f"Run: pip install {name}; or do without trackers: --log-with {NO_TRACKER}",
            )
