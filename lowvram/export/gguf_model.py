"""A model, its adapter added on the way, as one GGUF file: tensor by tensor, with no 16-bit copy between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFWriter
from gguf import GGMLQuantizationType as Type

from lowvram.errors import ConfigError
from lowvram.export.gguf_architectures import Architecture, architecture_of
from lowvram.export.gguf_bytes import write_bytes
from lowvram.export.gguf_hyperparameters import add_hyperparameters
from lowvram.export.gguf_kquants import NO_QUANTIZER, ggml_quantize, mixed_types
from lowvram.export.gguf_tensors import EMBEDDING, Placed, placed
from lowvram.export.gguf_types import FileType, Quantize, encoded, n_bytes, plain_type
from lowvram.export.gguf_vocabulary import Vocabulary, vocabulary
from lowvram.export.partial_folder import require_disk
from lowvram.export.tensors import Tensors
from lowvram.export.whole_file import whole_file

Progress = Callable[[int, int], None]  # bytes written, bytes in all
Check = Callable[[Path], object]  # looks at the whole file before it takes its name
_HEADER_BYTES = 64 << 20  # tokens, merges and tensor infos; Gemma's 256,000 tokens take 20 MB


def unchecked(_file: Path) -> None:
    """Trusts the file."""


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file to be: all is known and checked, nothing is read or written yet.

    Raises:
        ConfigError: an architecture, a tokenizer or a tensor that cannot be written, or no quantizer.
    """

    tensors: Tensors
    config: Any
    tokenizer: Any
    name: str
    kind: FileType

    def __post_init__(self) -> None:
        _ = self.architecture, self.vocabulary, self.placed  # each refuses what it cannot be
        if self.kind.mixed and self._quantize is None:
            raise ConfigError(f"Nothing here can quantize to {self.kind.name}.", NO_QUANTIZER)

    @cached_property
    def architecture(self) -> Architecture:
        return architecture_of(self.config)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        if EMBEDDING not in self.tensors.names:
            raise ConfigError(
                f"'{self.tensors.folder}' has no tensor '{EMBEDDING}'.", "Give the whole base: --base PATH"
            )
        return vocabulary(self.tokenizer, self.tensors.shape(EMBEDDING)[0])

    def as_kind(self, kind: FileType) -> GgufModel:
        """The same model in other numbers."""
        return replace(self, kind=kind)

    @cached_property
    def placed(self) -> list[Placed]:
        return placed(self.tensors, self.config, self.architecture)

    @cached_property
    def types(self) -> dict[str, Type]:
        """Of each tensor of the file."""
        return self.types_of(self.kind)

    def types_of(self, kind: FileType) -> dict[str, Type]:
        """The same, were the file of another kind."""
        shapes = {tensor.name: tensor.shape for tensor in self.placed}
        if kind.mixed:
            return mixed_types(kind, shapes, self.config.num_hidden_layers)
        return {name: plain_type(kind, shape) for name, shape in shapes.items()}

    @cached_property
    def _quantize(self) -> Quantize | None:
        return ggml_quantize() if self.kind.mixed else None

    def tensor_bytes(self, kind: FileType | None = None) -> int:
        """Of all tensors, in this kind of file or in another."""
        types = self.types_of(kind or self.kind)
        return sum(n_bytes(types[tensor.name], tensor.shape) for tensor in self.placed)

    def n_bytes(self, kind: FileType | None = None) -> int:
        """Of the whole file; the vocabulary is guessed at its largest."""
        return _HEADER_BYTES + self.tensor_bytes(kind)

    def require_room(self, output: Path) -> None:
        """Raises:
        DoesNotFitError: too little disk.
        """
        require_disk(output, self.n_bytes(), "The GGUF")

    def write(self, output: Path, progress: Progress | None = None, check: Check = unchecked) -> list[str]:
        """Write the file whole or not at all; what llama.cpp will do otherwise than transformers.

        Host memory is the largest tensor as it will be, beside some 100 MB of pieces.

        Raises:
            ConfigError: `output` is there already, or a value does not fit the type.
            DoesNotFitError: too little disk.
        """
        self.require_room(output)
        with whole_file(output) as partial:
            writer = GGUFWriter(partial, self.architecture.name)
            try:
                notes = self._write_keys(writer)
                self._write_tensors(writer, progress or (lambda _done, _total: None))
            finally:
                writer.close()
            check(partial)
        return [*notes, *self.vocabulary.notes]

    def _write_keys(self, writer: GGUFWriter) -> list[str]:
        writer.add_type("model")
        writer.add_name(self.name)
        writer.add_file_type(self.kind.code)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_vocab_size(len(self.vocabulary.tokens))
        notes = add_hyperparameters(writer, self.config, self.architecture)
        self.vocabulary.add_to(writer)
        for tensor in self.placed:
            kind = self.types[tensor.name]
            writer.add_tensor_info(tensor.name, tensor.shape, None, n_bytes(kind, tensor.shape), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return notes

    def _write_tensors(self, writer: GGUFWriter, progress: Progress) -> None:
        done, total = 0, self.tensor_bytes()
        for tensor in self.placed:
            kind = self.types[tensor.name]
            data = encoded(tensor, kind, self._quantize)
            write_bytes(writer, data)
            done += data.nbytes
            progress(done, total)
