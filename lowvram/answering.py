"""Answering: from a run, an adapter or a model to one that is loaded within the budget and answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lowvram.engine.config import BasePrecision, StepConfig
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, OutOfMemoryError, refusals_of_the_system
from lowvram.export.run_adapter import adapter_of, source_of, tokenizer_of
from lowvram.hardware import Hardware
from lowvram.planner.inference import InferencePlan, InferenceRequest, plan_inference
from lowvram.planner.plan import Plan
from lowvram.shell import typed
from lowvram.units import format_bytes

if TYPE_CHECKING:
    from lowvram.engine.adapter_folder import AdapterFolder
    from lowvram.engine.generate import Answers
    from lowvram.engine.switching import Switch

Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """What RUN and --adapter stand for, as far as no weight says it."""

    source: ModelSource
    adapters: tuple[AdapterFolder, ...]
    own: Path | None  # the adapter's folder that the tokenizer and the plan lie with
    notes: tuple[str, ...]

    @cached_property
    def tokenizer(self) -> Any:
        """The one that was saved with the adapter, which has the chat template of the training."""
        return tokenizer_of(self.own, self.source)

    @property
    def trained(self) -> StepConfig | None:
        """The run's step, where it is known."""
        file = self.own.resolve().parent / "plan.yaml" if self.own else None
        return Plan.from_yaml(file).step if file and file.is_file() else None


@dataclass(frozen=True)
class Loaded:
    """A model that answers, and the switch of its adapters."""

    plan: InferencePlan
    answers: Answers
    switch: Switch

    @property
    def tokenizer(self) -> Any:
        return self.answers.tokenizer


def find(
    run: str,
    more: Sequence[str] = (),
    base: str | None = None,
    *,
    instead: str | None = None,
    base_only: bool = False,
    trust_remote_code: bool = False,
    command: str | None = None,
) -> Found:
    """Look up what was asked for.

    Args:
        run: a run folder, an adapter's, a model's (merged or not), or a hub id.
        more: NAME=PATH of further adapters.
        base: instead of the one that the run's adapter names.
        instead: another adapter, instead of the run's own.
        base_only: leave all adapters out.
        command: what the user typed, whole.

    Raises:
        ConfigError: nothing usable is there.
    """
    from lowvram.engine.adapter_folder import AdapterFolder

    if base_only and instead is not None:
        raise ConfigError(
            "--base-only leaves out all adapters, and --adapter names one.", "Leave one of them out."
        )
    with refusals_of_the_system(f"'{run}' cannot be read", "Check its permissions."):
        own = _own_adapter(run)
        again = command or f"lowvram chat {typed(run)}"
        source = source_of(own, base, again) if own else ModelSource(run)
        source = ModelSource(source.name, trust_remote_code)
        if own is None and base is not None:
            raise ConfigError(f"'{run}' is a model itself.", "Leave --base out.")
        own = own if instead is None else adapter_of(Path(instead).expanduser())
        adapters = [AdapterFolder(_name_of(own), own)] if own else []
        adapters += [_named(text) for text in more]
        _require_different(adapters)
        used = () if base_only else tuple(adapters)
        return Found(source, used, own, _notes(source, used))


def _own_adapter(run: str) -> Path | None:
    """The adapter of a run or the folder itself; None where `run` is a model."""
    path = Path(run).expanduser()
    is_run = (path / "plan.yaml").is_file() or (path / "adapter").is_dir()
    if not (path / "adapter_config.json").is_file() and not is_run:
        return None
    return adapter_of(path)


def _name_of(adapter: Path) -> str:
    """The run's name, or the folder's; "adapter" where that would mean something else."""
    from lowvram.engine.switching import BASE

    path = adapter.resolve()
    name = re.sub(r"\s+", "-", path.parent.name if path.name == "adapter" else path.name)
    return name if name not in ("", BASE) else "adapter"


def _named(text: str) -> AdapterFolder:
    from lowvram.engine.adapter_folder import AdapterFolder

    name, equals, path = text.partition("=")
    if not equals or not name or not path or re.search(r"\s", name):
        raise ConfigError(f"--adapter '{text}' is no NAME=PATH.", "Write it like --adapter sql=runs/sql.")
    return AdapterFolder(name, adapter_of(Path(path).expanduser()))


def _require_different(adapters: Sequence[AdapterFolder]) -> None:
    from lowvram.engine.switching import BASE

    names = [adapter.name for adapter in adapters]
    twice = next((name for name in names if names.count(name) > 1 or name == BASE), None)
    if twice is not None:
        why = "means the model without any" if twice == BASE else "is the name of two"
        raise ConfigError(f"--adapter: '{twice}' {why}.", "Give each adapter a name of its own.")


def _notes(source: ModelSource, adapters: Sequence[AdapterFolder]) -> tuple[str, ...]:
    """Names are no proof, since folders move: shapes are checked, and another name is said aloud."""
    others = {a.name: str(a.config.base_model_name_or_path) for a in adapters}
    named = (f"{name} names the base '{other}'" for name, other in others.items() if other != source.name)
    return tuple(f"{note}; it is put on '{source.name}', whose shapes it fits" for note in named)


def precision_of(text: str | None) -> BasePrecision | None:
    """From the flag --precision.

    Raises:
        ConfigError: no such precision.
    """
    known: tuple[BasePrecision, ...] = get_args(BasePrecision)
    if text is not None and text not in known:
        raise ConfigError(f"There is no precision '{text}'.", f"Use {', '.join(known)}.")
    return next((one for one in known if one == text), None)


def planned(
    found: Found,
    hardware: Hardware,
    *,
    precision: str | None = None,
    context: int | None = None,
    batch: int | None = 1,
    rows: int = 1,
    say: Say = lambda _: None,
) -> InferencePlan:
    """What it takes, before a weight is read.

    Args:
        batch: rows at one time; None: as many of `rows` as fit.

    Raises:
        ConfigError, DoesNotFitError: as `plan_inference`.
    """
    asked = precision_of(precision)
    return plan_inference(
        InferenceRequest(
            found.source, hardware, found.adapters, found.trained, asked, context, batch, rows, say
        )
    )


def load(found: Found, plan: InferencePlan, hardware: Hardware) -> Loaded:
    """The base once, with all adapters; the first one is on.

    Raises:
        ConfigError: weights that are missing or broken.
        OutOfMemoryError: the device has less than it had when it was asked.
    """
    from lowvram.engine import model
    from lowvram.engine.generate import Answers
    from lowvram.engine.switching import Switch, add_layers

    tokenizer = found.tokenizer  # refuses before gigabytes are read
    with memory_errors(plan):
        base = model.load(found.source, plan.model_step, hardware.device)
        switch = Switch(add_layers(base, found.adapters), found.adapters)
        return Loaded(plan, Answers.of(base, tokenizer), switch)


@contextmanager
def memory_errors(plan: InferencePlan) -> Iterator[None]:
    """Say torch's out-of-memory error as ours, with the prediction.

    Raises:
        OutOfMemoryError: it came.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        predicted = format_bytes(plan.estimate.peak_reserved_bytes)
        raise OutOfMemoryError(
            f"{plan.device.name} ran out of memory; {predicted} were predicted and "
            f"{format_bytes(plan.budget_bytes)} were free: another program took some.",
            f"Close it, or ask for less: --context {max(plan.context // 2, 1)}",
        ) from error
