"""`lowvram export`: a run as GGUF or LoRA-GGUF, for Ollama, vLLM or peft, and what to type next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lowvram.engine.source import ModelSource
from lowvram.errors import StoppedError, refusals_of_the_system
from lowvram.export.adapter_files import Adapter, read_adapter
from lowvram.export.adapter_output import write_adapter
from lowvram.export.base_match import require_of_base
from lowvram.export.gguf_architectures import architecture_of
from lowvram.export.gguf_check import check_file, require_llama_cpp
from lowvram.export.gguf_lora import GgufLora, gguf_lora
from lowvram.export.gguf_model import Check, GgufModel, unchecked
from lowvram.export.gguf_model import Progress as Told
from lowvram.export.gguf_types import FILE_TYPES
from lowvram.export.gguf_vocabulary import adds_start_token
from lowvram.export.merged_tensors import MergedTensors
from lowvram.export.model_card import CARD_FILE
from lowvram.export.ollama import ADAPTER_FILE, MODEL_FILE, Modelfile, modelfile
from lowvram.export.partial_folder import require_new_folder, whole_or_not_at_all
from lowvram.export.push import files_of, push, require_pushable, upload_command
from lowvram.export.quantizer import QuantizedModel, for_kind
from lowvram.export.vllm import vllm_command
from lowvram.export_request import Export
from lowvram.frozen import require_new_file, write_atomically
from lowvram.shell import typed
from lowvram.training.signals import Interrupted, stop_on_signal
from lowvram.units import format_bytes

_CHECK = "Check the permissions and the path, or give another --output."
_NO_ROOM = "Free some room, or give an --output on another disk."
Files = dict[str, Path | bytes]  # by their names in a repository of the hub
Work = Callable[[Console], Files]  # what is left when all is checked: it writes, and says what to type next


def export_run(export: Export, console: Console) -> None:
    """Write what was asked for, whole or not at all, and say what to type next.

    Raises:
        ConfigError: no adapter, no base, something the format cannot hold, or the output is in use.
        DoesNotFitError: too little disk.
        MergeError: --check found that llama.cpp reads the file otherwise; it is removed.
        StoppedError: a signal came; nothing is left behind.
    """
    with refusals_of_the_system(f"'{export.run}' cannot be exported, nothing was written", _CHECK, _NO_ROOM):
        files = _prepared(export)(console)
    if export.push is not None:
        _say(console, f"Pushing to {export.push}")
        _say(console, f"Pushed: {_pushed(export, export.push, files)}")


def _pushed(export: Export, repo: str, files: Files) -> str:
    """The repository's address. A single file's card lies beside it until then, to be pushed by hand too."""
    again = [upload_command(repo, export.target, public=export.public)]
    if CARD_FILE in files:
        return push(files, repo, public=export.public, again=again[0])
    card = _card_beside(export)
    with refusals_of_the_system(f"'{card}' cannot be written, nothing was pushed", f"Push it: {again[0]}"):
        write_atomically(card, export.card)
    again.append(upload_command(repo, card, CARD_FILE, public=export.public))
    url = push({**files, CARD_FILE: card}, repo, public=export.public, again=" && ".join(again))
    card.unlink()
    return url


def _card_beside(export: Export) -> Path:
    return export.target.with_name(f"{export.target.name}.{CARD_FILE}")


def require_exportable(export: Export) -> None:
    """Refuse what `export_run` would before its work, and write nothing.

    Raises:
        ConfigError, DoesNotFitError: as `export_run`.
    """
    with refusals_of_the_system(f"'{export.run}' cannot be exported", _CHECK, _NO_ROOM):
        _prepared(export)


def _prepared(export: Export) -> Work:
    """All that can be refused is refused here, before a byte is written."""
    require_pushable(export.push, public=export.public)
    if export.push is not None and export.to in ("gguf", "lora-gguf"):
        require_new_file(_card_beside(export))  # it is written there and goes again
    return _ROADS[export.to](export)


def _to_gguf(export: Export) -> Work:
    require_new_file(export.target)
    model = _model(export)
    model.require_room(export.target)
    return partial(_write_gguf, export, model)


def _write_gguf(export: Export, model: GgufModel | QuantizedModel, console: Console) -> Files:
    with _progress(export, console) as told:
        notes = model.write(export.target, told, _check(export))
    _say(console, f"Wrote {_sized(export.target)}{_checked(export)}.", notes)
    file = typed(export.target)
    _say(console, f"Run it: llama-cli -m {file}, or for LM Studio: lms import {file}")
    return {export.target.name: export.target}


def _to_lora(export: Export) -> Work:
    require_new_file(export.target)
    return partial(_write_lora, export, _lora(export))


def _write_lora(export: Export, lora: GgufLora, console: Console) -> Files:
    lora.write(export.target)
    _say(console, f"Wrote {_sized(export.target)}.")
    _say(console, f"Run it on the base's GGUF: llama-cli -m BASE.gguf --lora {typed(export.target)}")
    return {export.target.name: export.target}


def _to_ollama(export: Export) -> Work:
    require_new_folder(export.target)
    written = _modelfile(export)
    if export.alone:
        return partial(_write_ollama, export, _lora(export), written)
    model = _model(export)
    model.require_room(export.target / MODEL_FILE)
    return partial(_write_ollama, export, model, written)


def _write_ollama(
    export: Export, model: GgufModel | QuantizedModel | GgufLora, written: Modelfile, console: Console
) -> Files:
    with whole_or_not_at_all(export.target) as folder, _progress(export, console) as told:
        notes = []
        if isinstance(model, GgufLora):
            model.write(folder / ADAPTER_FILE)
        else:
            notes = model.write(folder / MODEL_FILE, told, _check(export))
        write_atomically(folder / "Modelfile", written.text)
        write_atomically(folder / CARD_FILE, export.card)
    tag = _tag(export)
    _say(console, f"Wrote {export.target} with its Modelfile{_checked(export)}.", [*notes, *written.notes])
    _say(
        console,
        f"Run it: cd {typed(export.target)} && ollama create {tag} -f Modelfile && ollama run {tag}",
    )
    return files_of(export.target)


def _to_vllm(export: Export) -> Work:
    return partial(_tell_vllm, vllm_command(_of_its_base(export), export.source.name, _tag(export)))


def _tell_vllm(command: str, console: Console) -> Files:
    _say(console, "vLLM takes the adapter folder as it is; nothing was written. Serve it:")
    console.print(escape(command), soft_wrap=True)
    return {}


def _to_adapter(export: Export) -> Work:
    require_new_folder(export.target)
    _of_its_base(export)
    return partial(_write_adapter, export)


def _write_adapter(export: Export, console: Console) -> Files:
    base = export.training.plan.model if export.training else export.source.name
    with whole_or_not_at_all(export.target) as folder:
        write_adapter(export.adapter, base, folder)
        write_atomically(folder / CARD_FILE, export.card)
    _say(console, f"Wrote {export.target}, without a path of this machine.")
    return files_of(export.target)


_ROADS: dict[str, Callable[[Export], Work]] = {
    "gguf": _to_gguf,
    "lora-gguf": _to_lora,
    "ollama": _to_ollama,
    "vllm": _to_vllm,
    "adapter": _to_adapter,
}


def _model(export: Export) -> GgufModel | QuantizedModel:
    architecture_of(export.source.config)  # before a base is downloaded
    if export.check:
        require_llama_cpp()
    tensors = export.tensors
    plain = GgufModel(tensors, tensors.source.config, export.tokenizer, export.name, FILE_TYPES["f16"])
    return for_kind(plain, export.kind, export.quantizer)


def _check(export: Export) -> Check:
    return (lambda file: check_file(file, export.tokenizer)) if export.check else unchecked


def _of_its_base(export: Export) -> Adapter:
    """Of a base on the hub as far as its config is to be had; nobody needs its weights here."""
    adapter = read_adapter(export.adapter)
    trusted = export.training is not None and export.training.plan.trust_remote_code
    require_of_base(adapter, ModelSource(export.source.name, trusted))
    return adapter


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
            f"Start it again: {export.again}",
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
