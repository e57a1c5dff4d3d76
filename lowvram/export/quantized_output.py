"""A merged model in 4 bits, as bitsandbytes stores it and plain transformers loads it, and its error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowvram.engine.config import StepConfig
from lowvram.engine.linears import unquantized_modules
from lowvram.engine.model import NF4_BLOCK, skeleton
from lowvram.errors import ConfigError
from lowvram.export.base_files import write_rest
from lowvram.export.merge import MergeResult, config_changes
from lowvram.export.merged_tensors import MergedTensors
from lowvram.export.partial_folder import require_disk, whole_or_not_at_all
from lowvram.export.quantized_values import quantized_linears
from lowvram.export.rest_check import require_loadable_rest
from lowvram.export.shards import NamedPieces, Progress, shard_name, write_file, write_index
from lowvram.export.tensor_files import PIECE_NUMBERS
from lowvram.units import MiB

_SHARD_BYTES = 256 * MiB  # a file's tensors are in memory until it is written: how long they get is not known


@dataclass
class WeightError:
    """Of all quantised weights together: |W - Q(W)| / |W|."""

    difference: float = 0.0
    whole: float = 0.0

    def add(self, weight: torch.Tensor, read: torch.Tensor) -> None:
        flat, flat_read = weight.flatten(), read.flatten()
        for start in range(0, flat.numel(), PIECE_NUMBERS):
            one, other = (numbers[start : start + PIECE_NUMBERS] for numbers in (flat, flat_read))
            self.difference += float((one.float() - other.float()).square_().sum(dtype=torch.float64))
            self.whole += float(one.float().square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float:
        return float((self.difference / self.whole) ** 0.5) if self.whole else 0.0


def write_quantized(
    tensors: MergedTensors,
    adapter: Path | None,
    output: Path,
    *,
    double_quantization: bool,
    progress: Progress,
    check: Callable[[Path], object],
    max_shard_bytes: int = _SHARD_BYTES,
) -> tuple[MergeResult, WeightError]:
    """Merge, then quantise each linear layer but the head to NF4: what merging into 4 bits costs is measured.

    Raises:
        ConfigError: the output is in use, the model's layers cannot be stored so, or transformers would not
            load the configs or the tokenizer.
        DoesNotFitError: too little disk.
    """
    step = StepConfig.model_validate(
        {"base_precision": "nf4", "levers": {"double_quantization": double_quantization}}
    )
    linears = quantized_linears(tensors, step)
    if any(linears.values()):
        raise ConfigError(
            f"A '{tensors.source.config.model_type}' stores its weights turned, in which bitsandbytes cannot "
            "keep 4 bits.",
            "Leave --quantized-base out.",
        )
    require_disk(output, _n_bytes(tensors, set(linears)))
    changes = config_changes(tensors) | {"quantization_config": _bnb_config(tensors, step)}
    require_loadable_rest(tensors.source, adapter, changes)
    error = WeightError()
    with whole_or_not_at_all(output) as partial:
        parts = _Parts(partial, max_shard_bytes)
        n_bytes = _write(tensors, set(linears), parts, double_quantization, error, progress)
        write_rest(tensors.folder, adapter, partial, changes)
        check(partial)
    n_merged = len(tensors.changed)
    return MergeResult(folder=output, n_tensors=len(tensors.names), n_merged=n_merged, n_bytes=n_bytes), error


def _n_bytes(tensors: MergedTensors, linears: set[str]) -> int:
    """4.5 bits a weight at most (a scale in float32 for each block), and the rest as it is."""
    sizes = {name: tensors.n_bytes(name) for name in tensors.names}
    numbers = {name: sizes[name] // tensors.dtype(name).itemsize for name in linears}
    return sum(sizes.values()) - sum(sizes[n] - numbers[n] // 2 - numbers[n] // 16 for n in linears)


def _write(
    tensors: MergedTensors,
    linears: set[str],
    parts: _Parts,
    double_quantization: bool,
    error: WeightError,
    progress: Progress,
) -> int:
    """All tensors; returns the bytes written."""
    total, done = sum(map(tensors.n_bytes, tensors.names)), 0
    for name in tensors.names:
        made = {name: tensors.tensor(name)}
        if name in linears:
            made = _nf4(name, made[name], double_quantization, error)
        parts.add(made)
        done += tensors.n_bytes(name)
        progress(done, total)
    return parts.finish()


class _Parts:
    """Files of a chosen size, which get their names when it is known how many there are."""

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._names: list[list[str]] = []  # of each file that is written
        self._n_bytes = self._pending_bytes = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        n_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + n_bytes > self._max_bytes:
            self._flush()
        self._pending.update(tensors)
        self._pending_bytes += n_bytes

    def _flush(self) -> None:
        file = self._folder / f"part-{len(self._names)}.safetensors"
        write_file(file, [_in_memory(*item) for item in self._pending.items()], lambda _n_bytes: None)
        self._names.append(list(self._pending))
        self._n_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> int:
        self._flush()
        weight_map = {}
        for number, names in enumerate(self._names):
            file = shard_name(number + 1, len(self._names))
            (self._folder / f"part-{number}.safetensors").replace(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        write_index(self._folder, weight_map, self._n_bytes)
        return self._n_bytes


def _in_memory(name: str, tensor: torch.Tensor) -> NamedPieces:
    return NamedPieces(name, tensor.dtype, tuple(tensor.shape), lambda: iter((tensor,)))


def _nf4(
    name: str, weight: torch.Tensor, double_quantization: bool, error: WeightError
) -> dict[str, torch.Tensor]:
    """As bitsandbytes' Linear4bit saves itself."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.flatten(), blocksize=NF4_BLOCK, compress_statistics=double_quantization, quant_type="nf4"
    )
    error.add(weight, dequantize_4bit(packed, state))  # flat: rows of 96 numbers confuse bnb's CPU kernel
    state.shape = weight.shape
    return {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def _bnb_config(tensors: MergedTensors, step: StepConfig) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    config: dict[str, Any] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=step.levers.double_quantization,
        bnb_4bit_compute_dtype=config_changes(tensors)["dtype"],
        llm_int8_skip_modules=unquantized_modules(skeleton(tensors.source.config, step)),
    ).to_dict()
    return config
