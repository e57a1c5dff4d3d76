"""`lowvram export`: a run as GGUF or LoRA-GGUF, for Ollama or vLLM, and what to type next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, StoppedError, refusals_of_the_system
from lowvram.export.adapter_files import read_adapter
from lowvram.export.gguf_architectures import architecture_of
from lowvram.export.gguf_check import check_file, require_llama_cpp
from lowvram.export.gguf_lora import GgufLora, gguf_lora
from lowvram.export.gguf_model import Check, GgufModel, unchecked
from lowvram.export.gguf_model import Progress as Told
from lowvram.export.gguf_types import FILE_TYPES, FileType, file_type
from lowvram.export.gguf_vocabulary import adds_start_token
from lowvram.export.merged_tensors import MergedTensors
from lowvram.export.ollama import ADAPTER_FILE, MODEL_FILE, Modelfile, modelfile
from lowvram.export.partial_folder import refuse_used, whole_or_not_at_all
from lowvram.export.quantizer import QuantizedModel, for_kind
from lowvram.export.run_adapter import adapter_of, source_of
from lowvram.export.vllm import vllm_command
from lowvram.frozen import require_new_file
from lowvram.training.run_folder import RunFolder
from lowvram.training.signals import Interrupted, stop_on_signal
from lowvram.units import format_bytes

Target = Literal["gguf", "lora-gguf", "ollama", "vllm"]
TARGETS: tuple[Target, ...] = get_args(Target)
_COMMAND = "lowvram export"
_CHECK = "Check the permissions and the path, or give another --output."
_NO_ROOM = "Free some room, or give an --output on another disk."
_DEFAULT_TYPES: dict[str, str] = {"gguf": "f16", "ollama": "q8_0", "lora-gguf": "f32"}


@dataclass(frozen=True)
class Export:
    """What was asked for.

    Raises:
        ConfigError: an unknown target or type, or a setting that the target does not use.
    """

    run: Path
    to: str
    type_name: str | None = None
    output: Path | None = None
    base: str | None = None
    quantizer: Path | None = None
    ollama_base: str | None = None
    check: bool = False

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise ConfigError(f"--to '{self.to}' is unknown.", f"Give one of {', '.join(TARGETS)}.")
        unused = {
            "--type": self.type_name is not None and self.to == "vllm",
            "--output": self.output is not None and self.to == "vllm",
            "--quantizer": self.quantizer is not None and (self.to in ("vllm", "lora-gguf") or self.alone),
            "--check": self.check and (self.to == "vllm" or self.alone),
            "--ollama-base": self.ollama_base is not None and self.to != "ollama",
        }
        for flag, is_so in unused.items():
            if is_so:
                raise ConfigError(f"{flag} is not used by --to {self.to}.", f"Leave {flag} out.")

    @property
    def alone(self) -> bool:
        """Whether the adapter stays apart from its base."""
        return self.to == "lora-gguf" or self.ollama_base is not None

    @cached_property
    def kind(self) -> FileType:
        default = _DEFAULT_TYPES["lora-gguf" if self.alone else self.to]
        return file_type(self.type_name or default)

    @cached_property
    def adapter(self) -> Path:
        return adapter_of(self.run)

    @cached_property
    def source(self) -> ModelSource:
        return source_of(self.run, self.adapter, self.base, _COMMAND)

    @property
    def name(self) -> str:
        """Of the model, without the folders that lead to it."""
        return Path(self.source.name).name

    @cached_property
    def tokenizer(self) -> Any:
        """The adapter's own, which it was trained with; else the base's."""
        own = (self.adapter / "tokenizer_config.json").is_file()
        return (ModelSource(str(self.adapter)) if own else self.source).tokenizer

    @property
    def context(self) -> int | None:
        """Tokens of the longest example that the run trained on; None for a lone adapter folder."""
        from lowvram.planner.plan import Plan

        file = RunFolder(self.run).plan_file
        return Plan.from_yaml(file).seq_len if file.is_file() else None

    @property
    def target(self) -> Path:
        names = {"gguf": f"model-{self.kind.name}.gguf", "lora-gguf": "adapter.gguf", "ollama": "ollama"}
        return self.output or self.run / names[self.to]


def export_run(export: Export, console: Console) -> None:
    """Write what was asked for, whole or not at all, and say what to type next.

    Raises:
        ConfigError: no adapter, no base, something the format cannot hold, or the output is in use.
        DoesNotFitError: too little disk.
        MergeError: --check found that llama.cpp reads the file otherwise; it is removed.
        StoppedError: a signal came; nothing is left behind.
    """
    with refusals_of_the_system(f"'{export.run}' cannot be exported, nothing was written", _CHECK, _NO_ROOM):
        _ROADS[export.to](export, console)


def _to_gguf(export: Export, console: Console) -> None:
    require_new_file(export.target)
    model = _model(export)
    with _progress(export, console) as told:
        notes = model.write(export.target, told, _check(export))
    _say(console, f"Wrote {_sized(export.target)}{_checked(export)}.", notes)
    _say(console, f"Run it: llama-cli -m {export.target}, or for LM Studio: lms import {export.target}")


def _to_lora(export: Export, console: Console) -> None:
    require_new_file(export.target)  # before the work
    _lora(export).write(export.target)
    _say(console, f"Wrote {_sized(export.target)}.")
    _say(console, f"Run it on the base's GGUF: llama-cli -m BASE.gguf --lora {export.target}")


def _to_ollama(export: Export, console: Console) -> None:
    refuse_used(export.target)
    lora = _lora(export) if export.alone else None
    model = None if export.alone else _model(export)
    written = _modelfile(export)
    with whole_or_not_at_all(export.target) as folder, _progress(export, console) as told:
        notes = []
        if model is not None:
            notes = model.write(folder / MODEL_FILE, told, _check(export))
        if lora is not None:
            lora.write(folder / ADAPTER_FILE)
        (folder / "Modelfile").write_text(written.text, encoding="utf-8", newline="\n")
    tag = _tag(export)
    _say(console, f"Wrote {export.target} with its Modelfile{_checked(export)}.", [*notes, *written.notes])
    _say(
        console,
        f"Run it: cd {export.target} && ollama create {tag} -f Modelfile && ollama run {tag}",
    )


def _to_vllm(export: Export, console: Console) -> None:
    command = vllm_command(read_adapter(export.adapter), export.source.name, _tag(export))
    _say(console, "vLLM takes the adapter folder as it is; nothing was written. Serve it:")
    console.print(escape(command), soft_wrap=True)


_ROADS: dict[str, Callable[[Export, Console], None]] = {
    "gguf": _to_gguf,
    "lora-gguf": _to_lora,
    "ollama": _to_ollama,
    "vllm": _to_vllm,
}


def _model(export: Export) -> GgufModel | QuantizedModel:
    architecture_of(export.source.config)  # before a base is downloaded
    if export.check:
        require_llama_cpp()
    tensors = MergedTensors.open(export.source, export.adapter)
    plain = GgufModel(tensors, tensors.source.config, export.tokenizer, export.name, FILE_TYPES["f16"])
    return for_kind(plain, export.kind, export.quantizer)


def _check(export: Export) -> Check:
    return (lambda file: check_file(file, export.tokenizer)) if export.check else unchecked


def _lora(export: Export) -> GgufLora:
    made = gguf_lora(read_adapter(export.adapter), export.source.config, export.name, export.kind)
    if export.source.is_local:  # else its shapes would cost a download of its weights
        MergedTensors.open(export.source, export.adapter)
    return made


def _modelfile(export: Export) -> Modelfile:
    return modelfile(
        export.source,
        export.tokenizer,
        adapter_on=export.ollama_base,
        add_bos=adds_start_token(export.tokenizer),
        context=export.context,
    )


def _tag(export: Export) -> str:
    """A name for the model in Ollama or vLLM: the run's, in what both take."""
    name = export.run.resolve().name.lower()
    return (
        "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).strip("._-")
        or "model"
    )


@contextmanager
def _progress(export: Export, console: Console) -> Iterator[Told]:
    """A bar with an ETA; a signal ends the work, and leaves nothing."""
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    try:
        with stop_on_signal(lambda _: None), bar:
            task = bar.add_task("writing", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    except Interrupted as interrupt:
        raise StoppedError(
            "The export was stopped; nothing was written.",
            f"Start it again: {_COMMAND} {export.run} --to {export.to}",
            interrupt.signal_number,
        ) from interrupt


def _sized(file: Path) -> str:
    return f"{file} ({format_bytes(os.path.getsize(file))})"


def _checked(export: Export) -> str:
    return "; llama.cpp loads it and cuts a chat as it was trained" if export.check else ""


def _say(console: Console, text: str, notes: list[str] | None = None) -> None:
    console.print(escape(text), soft_wrap=True)
    for note in notes or []:
        console.print(f"[yellow]Note:[/] {escape(note)}", soft_wrap=True)
