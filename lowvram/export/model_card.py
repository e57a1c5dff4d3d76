"""The model card of an export: where it comes from, how it was trained, what was predicted and measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from lowvram import __version__
from lowvram.errors import ConfigError, first_line
from lowvram.export.adapter_files import read_adapter_config
from lowvram.frozen import Frozen
from lowvram.memory.receipt import Receipt
from lowvram.planner.plan import Plan
from lowvram.training.result import RunResult
from lowvram.training.run_folder import RunFolder
from lowvram.units import format_bytes, format_count, format_seconds, said

CARD_FILE = "README.md"
_SETTINGS = (
    *("base_precision", "compute_dtype", "target_modules", "rank", "alpha", "dropout", "bias"),
    *("use_rslora", "use_dora", "init", "seq_len", "effective_batch"),
    *("optimizer", "learning_rate", "schedule", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("total_steps", "seed"),
)

_OF_ADAPTER = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "use_dora")


class Training(Frozen):
    """What a run's folder says of how its adapter came about."""

    plan: Plan
    result: RunResult | None
    receipt: Receipt | None

    @classmethod
    def of_run(cls, run: Path) -> Training | None:
        """None for a folder that is no run: an adapter that somebody else trained."""
        folder = RunFolder(run)
        if not folder.plan_file.is_file():
            return None
        return cls(plan=Plan.from_yaml(folder.plan_file), result=folder.finished(), receipt=_receipt(folder))


class Contents(Frozen):
    """What the folder holds, which the card's reader cannot see from the training."""

    title: str
    what: str  # one sentence: "The adapter, merged into the bfloat16 weights of its base."
    base_model: str  # folder or hub id
    library: str  # as the hub calls it: transformers, peft, gguf
    licence: str | None  # of the base, `licence_of`
    settings: tuple[tuple[str, str], ...] = ()  # of an adapter without a run
    measured: tuple[str, ...] = ()  # of the export itself, a line each


def model_card(contents: Contents, training: Training | None) -> str:
    """README.md of the export; no path of this machine comes into it."""
    data = ModelCardData(
        base_model=contents.base_model if _is_hub_id(contents.base_model) else None,
        library_name=contents.library,
        license=contents.licence,
        pipeline_tag="text-generation",
        tags=["lowvram", "lora"],
    )
    sections = [_head(contents), *_trained(training, contents.settings), _measured(contents.measured)]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def title_of(base_model: str, run: Path) -> str:
    """Qwen2-7B-my-run."""
    return f"{named(base_model).rpartition('/')[2]}-{run.resolve().name}"


def adapter_settings(adapter: Path) -> tuple[tuple[str, str], ...]:
    """For a card without a run: what adapter_config.json says of how it was set up."""
    config = read_adapter_config(adapter)
    return tuple((name, _cell(config[name])) for name in _OF_ADAPTER if name in config)


def named(place: str) -> str:
    """A model or data set without the folders in which it lies here: its hub id, or its last name."""
    return place if _is_hub_id(place) else re.split(r"[/\\]", place.rstrip("/\\"))[-1]


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _head(contents: Contents) -> str:
    made = f"Made with lowvram {__version__}."
    return f"# {contents.title}\n\n{contents.what} Its base is `{named(contents.base_model)}`. {made}"


def _trained(training: Training | None, settings: Sequence[tuple[str, str]]) -> list[str]:
    if training is None:
        return [_table("Adapter", ("setting", "value"), settings)]
    plan = training.plan
    shown = [(name, _cell(getattr(plan, name))) for name in _SETTINGS]
    levers = [(name, said(value)) for name, value in plan.levers if value]
    return [
        _data(training),
        _table("Training", ("setting", "value"), shown),
        _table("Memory levers", ("lever", "value"), levers),
        _results(training.result),
        _memory(plan, training.receipt),
    ]


def _data(training: Training) -> str:
    plan = training.plan
    held_out = f"`{named(plan.eval_data)}`" if plan.eval_data else f"{plan.held_out_share:.1%} of it"
    return f"## Data\n\n`{named(str(plan.data))}`, held out: {held_out} (SHA-256 {plan.data_sha256})."


def _results(result: RunResult | None) -> str:
    if result is None:
        return ""
    other = "" if result.same_held_out else ", of other examples"
    rows = [
        (f"held-out loss before{other}", f"{result.held_out_loss_before:.4f}"),
        ("held-out loss after", f"{result.held_out_loss_after:.4f}"),
        ("optimizer steps", f"{result.steps:,}"),
        ("tokens", format_count(result.tokens)),
        ("time", format_seconds(result.seconds)),
        ("tokens/s", f"{result.tokens_per_second:.0f}"),
    ]
    return _table("Results", ("", "measured"), rows)


def _memory(plan: Plan, receipt: Receipt | None) -> str:
    """Predicted and measured in columns of their own; a device without counters measured nothing."""
    estimate = plan.estimate
    rows = [
        ("peak allocated", estimate.peak_allocated_bytes, receipt and receipt.measured_peak_allocated_bytes),
        ("peak reserved", estimate.peak_reserved_bytes, receipt and receipt.measured_peak_reserved_bytes),
    ]
    told = [(name, format_bytes(a), format_bytes(b) if b else "not measured") for name, a, b in rows]
    if receipt and receipt.measured_peak_resident_bytes:  # on a CPU, libraries and all
        told.append(("the whole process", "-", format_bytes(receipt.measured_peak_resident_bytes)))
    device = receipt.device if receipt else plan.device.name
    return _table(f"Memory of the training, on {device}", ("", "predicted", "measured"), told)


def _measured(lines: Sequence[str]) -> str:
    return "## Checked\n\n" + "\n".join(f"- {line.strip()}" for line in lines) if lines else ""


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return f"## {title}\n\n" + "\n".join(lines)


def _cell(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else said(value)
    return text.replace("|", "\\|")


def _receipt(folder: RunFolder) -> Receipt | None:
    try:
        return Receipt.model_validate_json(folder.receipt_file.read_bytes())
    except (OSError, ValueError):  # of another version, or the run has not come so far
        return None


def licence_of(base_folder: Path) -> str | None:
    """As the base's own card says it: what is made of the base stays under it.

    Raises:
        ConfigError: the card cannot be read.
    """
    card = base_folder / CARD_FILE
    if not card.is_file():
        return None
    try:
        licence = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(
            f"'{card}' cannot be read: {first_line(error)}.", "Repair it, or move it away."
        ) from error
    return str(licence) if licence else None
