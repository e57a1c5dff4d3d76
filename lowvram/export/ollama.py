"""An Ollama Modelfile: the model's file, its chat format, where it stops, the length it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowvram.engine.source import ModelSource
from lowvram.export.chat_format import ChatFormat, chat_format
from lowvram.export.gguf_vocabulary import end_of_turn

MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"
_NO_TEMPLATE = (
    "The chat template cannot be said in Ollama's own form, so the Modelfile has no TEMPLATE line; Ollama "
    "then goes by the template inside the GGUF, if it knows it. Compare an answer with: lowvram generate RUN"
)
_NO_SYSTEM = "The chat template has no system message; in Ollama it goes in front of the first question."
_DATED = "The chat template says the date; the Modelfile keeps today's."


@dataclass(frozen=True)
class Modelfile:
    """What the file says."""

    start: tuple[str, ...]  # FROM, and ADAPTER
    template: ChatFormat | None
    stops: tuple[str, ...]
    context: int | None  # tokens
    temperature: float
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """For `ollama create NAME -f Modelfile`."""
        lines = ["# Written by lowvram. Use it with: ollama create NAME -f Modelfile, then: ollama run NAME"]
        lines += self.start
        if self.template is not None:
            lines.append(f'TEMPLATE """{self.template.go_template}"""')
        lines += [f"PARAMETER stop {_quoted(stop)}" for stop in self.stops]
        if self.context is not None:
            lines.append(f"PARAMETER num_ctx {self.context}")
        lines.append(f"PARAMETER temperature {self.temperature:g}")
        return "\n".join(lines) + "\n"


def modelfile(
    base: ModelSource, tokenizer: Any, *, adapter_on: str | None, add_bos: bool, context: int | None
) -> Modelfile:
    """The Modelfile of a model.

    Args:
        base: for its generation config.
        adapter_on: Ollama's name of the base, where the adapter stays apart.
        add_bos: whether the GGUF says that the engine puts the start token; the template then must not.
        context: tokens of a conversation that it was trained on.
    """
    found = chat_format(tokenizer) if tokenizer.chat_template else None
    notes = []
    if found is None:
        notes.append(_NO_TEMPLATE)
    else:
        notes += [] if found.own_system else [_NO_SYSTEM]
        notes += [_DATED] if "strftime_now" in str(tokenizer.chat_template) else []
        found = found.without_start(tokenizer.bos_token) if add_bos else found
    config = _generation_config(base)
    start = (
        (f"FROM ./{MODEL_FILE}",)
        if adapter_on is None
        else (f"FROM {adapter_on}", f"ADAPTER ./{ADAPTER_FILE}")
    )
    return Modelfile(
        start=start,
        template=found,
        stops=stop_tokens(tokenizer, config),
        context=context,
        temperature=float(config.temperature or 1.0) if config is not None and config.do_sample else 0.0,
        notes=tuple(notes),
    )


def stop_tokens(tokenizer: Any, config: Any) -> tuple[str, ...]:
    """Texts of the tokens at which the model stops: its template's, its tokenizer's, its generation's."""
    own = getattr(config, "eos_token_id", None)
    ids = [end_of_turn(tokenizer), tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    known = [i for i in dict.fromkeys(ids) if i is not None and i < len(tokenizer)]
    return tuple(map(str, tokenizer.convert_ids_to_tokens(known)))


def _generation_config(base: ModelSource) -> Any:
    """The base's generation_config.json; None where it has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(base.name, local_files_only=base.refusal is not None)
    except OSError:
        return None


def _quoted(text: str) -> str:
    return '"""' + text + '"""' if '"' in text else f'"{text}"'
