"""A model, its adapter added on the way, as one GGUF file: tensor by tensor, with no 16-bit copy between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFWriter

from lowvram.errors import ConfigError
from lowvram.export.gguf_architectures import Architecture, architecture_of
from lowvram.export.gguf_hyperparameters import add_hyperparameters
from lowvram.export.gguf_kquants import ggml_quantize, mixed_types
from lowvram.export.gguf_tensors import EMBEDDING, Placed, placed
from lowvram.export.gguf_types import FileType, Quantize, Type, encoded, n_bytes, plain_type
from lowvram.export.gguf_vocabulary import Vocabulary, vocabulary
from lowvram.export.tensors import Tensors
from lowvram.export.whole_file import require_disk, whole_file
from lowvram.frozen import require_new_file

Progress = Callable[[int, int], None]  # bytes written, bytes in all
_HEADER_BYTES = 64 << 20  # tokens, merges and tensor infos; Gemma's 256,000 tokens take 20 MB
_NO_QUANTIZER = (
    "Install one: pip install xllamacpp, or give llama.cpp's: --quantizer PATH/llama-quantize, or take --type q8_0"
)


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
        assert self.architecture and self.vocabulary and self.placed
        if self.kind.mixed and self._quantize is None:
            raise ConfigError(f"Nothing here can quantize to {self.kind.name}.", _NO_QUANTIZER)

    @cached_property
    def architecture(self) -> Architecture:
        return architecture_of(self.config)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        if EMBEDDING not in self.tensors.names:
            raise ConfigError(f"'{self.tensors.folder}' has no tensor '{EMBEDDING}'.", "Give the whole base: --base PATH")
        return vocabulary(self.tokenizer, self.tensors.shape(EMBEDDING)[0])

    @cached_property
    def placed(self) -> list[Placed]:
        return placed(self.tensors, self.config, self.architecture)

    @cached_property
    def types(self) -> dict[str, Type]:
        """Of each tensor of the file."""
        shapes = {tensor.name: tensor.shape for tensor in self.placed}
        if self.kind.mixed:
            return mixed_types(self.kind, shapes, self.config.num_hidden_layers)
        return {name: plain_type(self.kind, shape) for name, shape in shapes.items()}

    @cached_property
    def _quantize(self) -> Quantize | None:
        return ggml_quantize() if self.kind.mixed else None

    @property
    def n_bytes(self) -> int:
        """Of all tensors."""
        return sum(n_bytes(self.types[tensor.name], tensor.shape) for tensor in self.placed)

    def write(self, output: Path, progress: Progress | None = None) -> list[str]:
        """Write the file whole or not at all; what llama.cpp will do otherwise than transformers.

        Host memory is the largest tensor, three times in float32, beside the vocabulary.

        Raises:
            ConfigError: `output` is there already, or a value does not fit the type.
            DoesNotFitError: too little disk.
        """
        require_new_file(output)
        require_disk(output, self.n_bytes + _HEADER_BYTES, "The GGUF")
        with whole_file(output) as partial:
            writer = GGUFWriter(partial, self.architecture.name)
            try:
                notes = self._write_keys(writer)
                self._write_tensors(writer, progress or (lambda _done, _total: None))
            finally:
                writer.close()
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
        done, total = 0, self.n_bytes
        for tensor in self.placed:
            kind = self.types[tensor.name]
            data = encoded(tensor.name, tensor.read(), kind, self._quantize)
            writer.write_tensor_data(data)
            done += data.nbytes
            progress(done, total)


def gguf_model(tensors: Tensors, tokenizer: Any, name: str, kind: FileType) -> GgufModel:
    """The file to be of a model and its adapter.

    Args:
        tokenizer: the adapter's own where it has one: the model was trained with it.

    Raises:
        ConfigError: it cannot be written; says why before any work.
    """
    from lowvram.engine.source import ModelSource

    return GgufModel(tensors, ModelSource(str(tensors.folder)).config, tokenizer, name, kind)
