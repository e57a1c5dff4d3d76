"""An adapter alone as LoRA-GGUF: llama.cpp and Ollama put it on the base's own GGUF when they load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, Keys

from lowvram.errors import ConfigError
from lowvram.export.adapter_files import Adapter, ModuleUpdate
from lowvram.export.gguf_architectures import Architecture, architecture_of
from lowvram.export.gguf_bytes import write_bytes
from lowvram.export.gguf_tensors import HEAD, Placed, row_order
from lowvram.export.gguf_types import FileType, encoded, n_bytes
from lowvram.export.partial_folder import require_disk
from lowvram.export.whole_file import whole_file
from lowvram.frozen import require_new_file

LORA_TYPES = ("f32", "f16", "bf16")
_HEADER_BYTES = 1 << 20
_MERGED = "Export the merged model, which holds it: lowvram export RUN --to gguf"


@dataclass(frozen=True)
class GgufLora:
    """A LoRA-GGUF to be: checked, nothing is written yet."""

    architecture: Architecture
    name: str
    alpha: float  # llama.cpp scales by alpha / rank
    tensors: list[Placed]
    kind: FileType

    def write(self, output: Path) -> None:
        """Write the file whole or not at all.

        Raises:
            ConfigError: `output` is there already, or a value does not fit the type.
            DoesNotFitError: too little disk.
        """
        require_new_file(output)
        size = sum(n_bytes(self.kind.main, tensor.shape) for tensor in self.tensors)
        require_disk(output, size + _HEADER_BYTES, "The LoRA-GGUF")
        with whole_file(output) as partial:
            writer = GGUFWriter(partial, self.architecture.name)
            try:
                self._write(writer)
            finally:
                writer.close()

    def _write(self, writer: GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_name(self.name)
        writer.add_file_type(self.kind.code)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, self.alpha)
        for tensor in self.tensors:
            size = n_bytes(self.kind.main, tensor.shape)
            writer.add_tensor_info(tensor.name, tensor.shape, None, size, self.kind.main)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in self.tensors:
            write_bytes(writer, encoded(tensor, self.kind.main))


def gguf_lora(adapter: Adapter, config: Any, name: str, kind: FileType) -> GgufLora:
    """The file to be of an adapter.

    Args:
        config: of the base.

    Raises:
        ConfigError: an architecture that GGUF cannot hold here, or more than LoRA factors.
    """
    architecture = architecture_of(config)
    if kind.name not in LORA_TYPES:
        raise ConfigError(
            f"An adapter is not written as {kind.name}: its rows are as short as its rank.",
            f"Give --type {', '.join(LORA_TYPES)}, or export the merged model: lowvram export RUN --to gguf",
        )
    names = architecture.renamed([f"{module}.weight" for module in adapter.modules], config.num_hidden_layers)
    for module, update in adapter.modules.items():
        _require_plain(module, update, names, config)
    updates = {f"{module}.weight": update for module, update in adapter.modules.items()}
    alpha = _alpha(next(iter(updates.values())))
    tensors = [
        tensor
        for source, update in updates.items()
        for tensor in _factors(
            names[source], update, alpha, row_order(source, _rows(update), config, architecture)
        )
    ]
    return GgufLora(architecture, name, alpha, tensors, kind)


def _require_plain(module: str, update: ModuleUpdate, names: dict[str, str], config: Any) -> None:
    """llama.cpp adds alpha / r * B A to matrices, and knows nothing else."""
    head_is_embedding = f"{module}.weight" == HEAD and config.tie_word_embeddings
    wrong = {
        "uses DoRA": update.magnitude is not None,
        "trains a bias": update.lora_bias is not None or "bias" in update.replaced,
        "replaces the whole weight (modules_to_save)": "weight" in update.replaced,
        "trains single tokens": update.token_rows is not None,
        "changes an embedding": update.is_embedding,
        "changes a head that is the embedding in the base": head_is_embedding,
        "lies where llama.cpp has no tensor": f"{module}.weight" not in names,
    }
    found = [text for text, is_so in wrong.items() if is_so]
    if found:
        raise ConfigError(f"A LoRA-GGUF cannot hold this adapter: '{module}' {found[0]}.", _MERGED)


def _rows(update: ModuleUpdate) -> int:
    assert update.b is not None
    return update.b.shape[0]


def _alpha(update: ModuleUpdate) -> float:
    """alpha / r is the scaling; so is rsLoRA's alpha / sqrt(r) with another alpha."""
    assert update.a is not None
    return update.scaling * update.a.shape[0]


def _factors(name: str, update: ModuleUpdate, alpha: float, order: torch.Tensor | None) -> list[Placed]:
    """A as it is; B in llama.cpp's order of rows, times what its own scaling is above that of the file."""
    a, b, more = update.a, update.b, _alpha(update) / alpha
    assert a is not None
    assert b is not None
    return [
        Placed(f"{name}.lora_a", a.shape, lambda: [a.whole()]),
        Placed(f"{name}.lora_b", b.shape, lambda: [b.whole().float() * more], order),
    ]
