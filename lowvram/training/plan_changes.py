"""Plan changes: what of a run's plan or data is not as it was in its checkpoint, and which of it may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram.errors import ConfigError
from lowvram.shell import typed
from lowvram.training import checkpoint

if TYPE_CHECKING:
    from lowvram.planner.plan import Plan
    from lowvram.training.data import PreparedData
    from lowvram.training.run_folder import RunFolder

# Of these the checkpoint's tensors are made: their names, their shapes, or the values they began with.
_FIXED = {"model", "task_type", "rank", "target_modules", "bias", "use_dora", "freeze_a", "init"}
_FIXED |= {"init_batches", "optimizer", "lora_plus_ratio", "inference_mode"}
HELD_OUT = ("data", "eval_data", "held_out_share", "seq_len", "target_len")  # decide what is evaluated
_HASHES = {"data_sha256": "data", "eval_data_sha256": "eval_data"}
_SHOWN_DIGITS = 12  # of a hash


class Change(NamedTuple):
    """One value that differs; `fixed`: no --force helps."""

    field: str
    text: str  # "learning_rate: 0.0002 -> 0.001"
    fixed: bool


class Known(NamedTuple):
    """What a run's newest whole checkpoint says; of a run without one, what its plan does."""

    step: int
    plan: Mapping[str, Any]  # Plan.deciding
    counts: Mapping[str, int]  # of examples, by the names in _HASHES


def counts(prepared: PreparedData) -> dict[str, int]:
    """Examples by what they came from."""
    stats = prepared.stats
    if stats.eval_sha256 is None:
        return {"data": stats.n_examples + stats.n_held_out}
    return {"data": stats.n_examples, "eval_data": stats.n_held_out}


def known_of(newest: Path | None, folder: RunFolder, plan: Plan) -> Known:
    """What `newest`, the newest whole checkpoint, says; without one, what the run's `plan` does.

    Raises:
        ConfigError: the checkpoint was written by a version that does not say.
    """
    if newest is None:
        return Known(0, plan.deciding, {})
    values = checkpoint.read_values(newest)
    try:
        return Known(values["step"], values["extra"]["plan"], values["extra"]["counts"])
    except KeyError as error:
        raise ConfigError(
            f"{newest} does not say under which plan it was written: an earlier lowvram wrote it.",
            "Go on with that version, or start anew: "
            f"lowvram train {typed(folder.plan_file)} --output ANOTHER",
        ) from error


def changes(known: Known, plan: Plan, counted: Mapping[str, int]) -> list[Change]:
    """Every difference that training would notice.

    Args:
        plan: with the hashes of the data as it is now.
        counted: its examples.
    """
    found = []
    new = plan.deciding
    for name in {**known.plan, **new}:
        for field, before, after in _differences(name, known.plan.get(name), new.get(name)):
            if field in _HASHES:
                field = _HASHES[field]
                before, after = _hash(before, known.counts.get(field)), _hash(after, counted.get(field))
            found.append(Change(field, f"{field}: {_said(before)} -> {_said(after)}", _is_fixed(name, plan)))
    return found


def _is_fixed(name: str, plan: Plan) -> bool:
    """Vectors that train are in a group of their own where matrices decay: so many states, in that order."""
    trains_vectors = plan.bias != "none" or plan.use_dora
    return name in _FIXED or (name == "weight_decay" and trains_vectors)


def _differences(name: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """The value, or of a group such as levers each value that differs."""
    if before == after:
        return
    if not (isinstance(before, dict) and isinstance(after, dict)):
        yield name, before, after
        return
    for key in {**before, **after}:
        yield from _differences(f"{name}.{key}", before.get(key), after.get(key))


def _hash(sha256: str | None, count: int | None) -> str:
    """`1f2e3d4c5b6a (30 examples)`"""
    if sha256 is None:
        return "none"
    return sha256[:_SHOWN_DIGITS] + (f" ({count} examples)" if count is not None else "")


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def refuse_changes(run: Path, known: Known, found: list[Change], force: bool) -> None:
    """Refuse to go on with what is not as it was, unless that was asked for and is possible.

    Raises:
        ConfigError: says every change, old and new.
    """
    where = f"in the checkpoint of step {known.step}" if known.step else "when the run began"
    fixed = [change for change in found if change.fixed]
    if fixed:
        raise ConfigError(
            f"{run} cannot go on with what is not as it was {where}: its tensors are made for the old value."
            + _list(fixed),
            f"Set {fixed[0].text.split(' -> ')[0]} again in {run / 'plan.yaml'}, or start anew: "
            f"lowvram train {typed(run / 'plan.yaml')} --output ANOTHER",
        )
    if found and not force:
        raise ConfigError(
            f"{run} is not as it was {where}." + _list(found),
            f"Undo the change, or go on with it: lowvram resume {typed(run)} --force",
        )


def refuse_shorter(run: Path, known: Known, plan: Plan) -> None:
    """Raises: ConfigError, the plan ends before the checkpoint."""
    if plan.total_steps < known.step:
        raise ConfigError(
            f"total_steps is {plan.total_steps}, and the checkpoint in {run} is of step {known.step}.",
            f"Set total_steps to {known.step} or more in {run / 'plan.yaml'}.",
        )


def _list(found: list[Change]) -> str:
    return "".join(f"\n  {change.text}" for change in found)
