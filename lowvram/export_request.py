"""What `lowvram export` is asked for, checked, and what of run, adapter and base it needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.gguf_types import FileType, file_type
from lowvram.export.merged_tensors import MergedTensors
from lowvram.export.model_card import Contents, Training, adapter_settings, licence_of, model_card, title_of
from lowvram.export.run_adapter import adapter_of, source_of, tokenizer_of
from lowvram.shell import typed

Target = Literal["gguf", "lora-gguf", "ollama", "vllm", "adapter"]
TARGETS: tuple[Target, ...] = get_args(Target)
_LEAST_CONTEXT = 2048  # tokens, as lowvram chat: examples of 120 tokens are no length for a conversation
_DEFAULT_TYPES: dict[str, str] = {"gguf": "f16", "ollama": "q8_0", "lora-gguf": "f32"}


@dataclass(frozen=True)
class Export:
    """What was asked for.

    Raises:
        ConfigError: an unknown target or type, a setting that the target does not use, or an empty one.
    """

    run: Path
    to: str
    type_name: str | None = None
    output: Path | None = None
    base: str | None = None
    quantizer: Path | None = None
    ollama_base: str | None = None
    push: str | None = None
    public: bool = False
    check: bool = False
    command: str | None = None  # as the user typed it, whole

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise ConfigError(f"--to '{self.to}' is unknown.", f"Give one of {', '.join(TARGETS)}.")
        unused = {
            "--type": self.type_name is not None and self.to in ("vllm", "adapter"),
            "--output": self.output is not None and self.to == "vllm",
            "--quantizer": self.quantizer is not None and self.alone,
            "--check": self.check and self.alone,
            "--ollama-base": self.ollama_base is not None and self.to != "ollama",
            "--push": self.push is not None and self.to == "vllm",
        }
        for flag, is_so in unused.items():
            if is_so:
                raise ConfigError(f"{flag} is not used by --to {self.to}.", f"Leave {flag} out.")
        if self.ollama_base == "":
            raise ConfigError("--ollama-base is empty.", "Give Ollama's name of the base, or leave it out.")

    @property
    def alone(self) -> bool:
        """Whether the adapter stays apart from its base."""
        return self.to in ("lora-gguf", "vllm", "adapter") or self.ollama_base is not None

    @cached_property
    def kind(self) -> FileType:
        default = _DEFAULT_TYPES["lora-gguf" if self.alone else self.to]
        return file_type(self.type_name or default)

    @property
    def again(self) -> str:
        """What starts it again."""
        return self.command or f"lowvram export {typed(self.run)} --to {self.to}"

    @cached_property
    def adapter(self) -> Path:
        return adapter_of(self.run)

    @cached_property
    def source(self) -> ModelSource:
        return source_of(self.adapter, self.base, self.again)

    @property
    def name(self) -> str:
        """Of the model, without the folders that lead to it."""
        return Path(self.source.name).name

    @cached_property
    def tokenizer(self) -> Any:
        """The adapter's own, which it was trained with; else the base's."""
        return tokenizer_of(self.adapter, self.source)

    @property
    def context(self) -> int | None:
        """Tokens of a conversation: as the run's longest example, at least 2,048; None without a run."""
        if self.training is None:
            return None
        longest = getattr(self.source.config.get_text_config(), "max_position_embeddings", None)
        wanted = max(self.training.plan.seq_len, _LEAST_CONTEXT)
        return min(wanted, longest) if longest else wanted

    @property
    def target(self) -> Path:
        names = {"lora-gguf": "adapter.gguf", "ollama": "ollama", "adapter": "adapter-to-share"}
        return self.output or self.run / (names.get(self.to) or f"model-{self.kind.name}.gguf")

    @cached_property
    def tensors(self) -> MergedTensors:
        """Of base and adapter; a base on the hub is downloaded for it."""
        return MergedTensors.open(self.source, self.adapter)

    @cached_property
    def training(self) -> Training | None:
        return Training.of_run(self.run)

    @property
    def what(self) -> str:
        """What comes out, in a sentence."""
        adapter = f"A LoRA adapter as GGUF ({self.kind.name})" if self.to != "adapter" else ""
        merged = f"A LoRA adapter, merged into its base, as GGUF ({self.kind.name})"
        said = {
            "gguf": merged,
            "lora-gguf": f"{adapter}, for its base's GGUF",
            "ollama": f"{adapter} on Ollama's {self.ollama_base}" if self.alone else f"{merged}, for Ollama",
            "adapter": "A LoRA adapter in peft's format",
        }
        return f"{said[self.to]}."

    @cached_property
    def card(self) -> str:
        """README.md of what is exported."""
        base = self.training.plan.model if self.training else self.source.name
        contents = Contents(
            title=title_of(base, self.run),
            what=self.what,
            base_model=base,
            library="peft" if self.to == "adapter" else "gguf",
            licence=licence_of(self._base_folder) if self._base_folder else None,
            settings=adapter_settings(self.adapter),
        )
        return model_card(contents, self.training)

    @property
    def _base_folder(self) -> Path | None:
        """None where the adapter alone is exported and its base is on the hub."""
        if not self.alone:
            return self.tensors.folder
        return Path(self.source.name) if self.source.is_local else None
