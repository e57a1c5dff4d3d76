"""MergedTensors: base and adapter as one model's tensors, computed from the files when asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.adapter_files import ModuleUpdate, read_adapter
from lowvram.export.base_files import base_folder
from lowvram.export.tensor_changes import Change, LowRank, Rows
from lowvram.export.tensor_files import StoredTensor, name_in_file, tensors_of_folder
from lowvram.export.tied_weights import settle

MERGEABLE = (torch.bfloat16, torch.float16, torch.float32)
BaseValues = Callable[[str, StoredTensor], Rows]  # name, as stored -> as a quantised base shows it
_OWN_BASE = "Give the base that the adapter was trained on: --base PATH"
_TURNED_MODELS = ("gpt2", "openai-gpt", "imagegpt")  # of transformers' Conv1D, whose weight is [in, out]


@dataclass(frozen=True)
class _Output:
    base: StoredTensor
    change: Change | None


class MergedTensors:
    """The tensors of base + adapter, or of the base alone, one at a time."""

    def __init__(self, source: ModelSource, outputs: dict[str, _Output], untied: bool) -> None:
        """`source`: the base's local folder."""
        self.source = source
        self.untied = untied
        self._outputs = outputs
        self._dtype: torch.dtype | None = None
        self._base_values: BaseValues = lambda _, stored: stored

    @classmethod
    def open(cls, base: ModelSource, adapter: Path | None) -> MergedTensors:
        """Read the headers of base and adapter and match them; no number is read but those of a tied head.

        Raises:
            ConfigError: one of them is missing, damaged or pickled, or they do not belong together.
        """
        read = read_adapter(adapter) if adapter is not None else None
        source = ModelSource(str(base_folder(base)), base.trust_remote_code)
        stored = tensors_of_folder(Path(source.name))
        if read is None:
            return cls(source, {name: _Output(tensor, None) for name, tensor in stored.items()}, untied=False)
        turned = bool(read.config.get("fan_in_fan_out")) or source.config.model_type in _TURNED_MODELS
        changes: dict[str, Change] = {}
        for module, update in read.modules.items():
            changes.update(_changes(module, update, stored, turned))
        untied = settle(source, changes, stored)
        _require_match(source, changes, stored | untied)
        return cls(source, _outputs(stored, untied, changes), bool(untied))

    @property
    def folder(self) -> Path:
        """The base's local folder."""
        return Path(self.source.name)

    @property
    def names(self) -> list[str]:
        """In the order of the base's files."""
        return list(self._outputs)

    @property
    def changed(self) -> list[str]:
        """Those that the adapter changes."""
        return [name for name, output in self._outputs.items() if output.change is not None]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._outputs[name].base.shape

    def dtype(self, name: str) -> torch.dtype:
        """As stored in the base, or as `stored_as` wants it."""
        own = self._outputs[name].base.dtype
        return self._dtype if self._dtype is not None and own in MERGEABLE else own

    def n_bytes(self, name: str) -> int:
        output = self._outputs[name].base
        return output.n_bytes // output.dtype.itemsize * self.dtype(name).itemsize

    def stored_as(self, dtype: torch.dtype) -> None:
        """From now on all floating-point tensors are rounded to `dtype`."""
        self._dtype = dtype

    def merge_onto(self, values: BaseValues) -> None:
        """From now on the adapter is added to what `values` shows of the base."""
        self._base_values = values

    def tensor(self, name: str) -> torch.Tensor:
        """Merged in float32, rounded once to its stored dtype."""
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        rows, start = whole if whole.ndim else whole[None], 0
        for piece in self.pieces(name):
            stop = start + (piece.shape[0] if piece.ndim else 1)
            rows[start:stop] = piece
            start = stop
        return whole

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The same some rows at a time: a 70B's head takes 32 MiB instead of 2 GiB."""
        output, dtype = self._outputs[name], self.dtype(name)
        base = self._base_values(name, output.base)
        unchanged = output.change is None and base is output.base and dtype == output.base.dtype
        if unchanged or dtype not in MERGEABLE:
            yield from (base.rows(*span) for span in base.spans())
            return
        for piece in (output.change or Change()).merged(base):
            rounded = piece.to(dtype)
            if not torch.isfinite(rounded).all():
                raise ConfigError(
                    f"'{name}' would hold a number that {str(dtype).removeprefix('torch.')} cannot.",
                    "Use --dtype bf16 or fp32; if it does already, the adapter or the base is broken.",
                )
            yield rounded

    def working_bytes(self) -> int:
        """Host memory that merging takes beyond the program."""
        changes = [output.change for output in self._outputs.values() if output.change is not None]
        low_ranks = [change.low_rank for change in changes if change.low_rank is not None]
        return working_bytes([output.base for output in self._outputs.values()], low_ranks)


def working_bytes(tensors: Iterable[StoredTensor], low_ranks: Iterable[LowRank]) -> int:
    """Of the largest piece and the largest pair of factors: 8 bytes for each number of a pair (as stored, and
    in float32), 14 for each of a piece (as stored, its update, their sum, and as it is written).
    """
    pieces = [
        max(stop - start for start, stop in tensor.spans()) * prod(tensor.shape[1:])
        for tensor in tensors
        if tensor.n_bytes
    ]
    return 8 * max((pair.n_numbers for pair in low_ranks), default=0) + 14 * max(pieces, default=0)


def _changes(
    module: str, update: ModuleUpdate, stored: dict[str, StoredTensor], turned: bool
) -> dict[str, Change]:
    """Tensor name -> change, of one module."""
    weight, bias = (name_in_file(f"{module}.{kind}", stored) for kind in ("weight", "bias"))
    made = {
        name_in_file(f"{module}.{parameter}", stored): Change(replaced=values)
        for parameter, values in update.replaced.items()
    }
    low_rank = None
    if update.a is not None and update.b is not None:
        shape = stored[weight].shape if weight in stored else None
        low_rank = _low_rank(update, shape, turned)
    if low_rank or update.token_rows:
        made[weight] = Change(
            replaced=update.replaced.get("weight"),
            low_rank=low_rank,
            token_rows=update.token_rows,
            token_ids=update.token_ids,
        )
    if update.lora_bias is not None:
        made[bias] = Change(update.replaced.get("bias"), added=update.lora_bias, scaling=update.scaling)
    return made


def _low_rank(update: ModuleUpdate, shape: tuple[int, ...] | None, turned: bool) -> LowRank:
    """peft's own rule: Conv1D layers are turned, linear layers are not, whatever the config says."""
    assert update.a is not None
    assert update.b is not None
    lies = LowRank(update.a, update.b, update.scaling, True, update.magnitude)
    if update.is_embedding or (turned and shape in (None, lies.shape)):
        return lies
    return LowRank(update.a, update.b, update.scaling, False, update.magnitude)


def _outputs(
    stored: dict[str, StoredTensor], untied: dict[str, StoredTensor], changes: dict[str, Change]
) -> dict[str, _Output]:
    bases: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        bases[name] = untied.get(name, tensor)
        new = (other for other, base in untied.items() if base is tensor and other not in stored)
        bases.update(dict.fromkeys(new, tensor))
    return {name: _Output(base, changes.get(name)) for name, base in bases.items()}


def _require_match(source: ModelSource, changes: dict[str, Change], stored: dict[str, StoredTensor]) -> None:
    """Refuse a change of what is not there, has another shape, or is made when transformers loads the model."""
    converters = _converters(source.config)
    for name, change in changes.items():
        if name not in stored:
            raise ConfigError(
                f"The adapter changes '{name}', which the base does not have: {_why_absent(name, converters)}.",
                _OWN_BASE,
            )
        if made := _made_by(converters, name):
            raise ConfigError(
                f"The adapter changes '{name}', which transformers makes of other tensors when it loads a "
                f"'{source.config.model_type}' ({made}).",
                "Keep using it with peft, unmerged.",
            )
        _require_same(name, change, stored[name])


def _require_same(name: str, change: Change, base: StoredTensor) -> None:
    if base.dtype not in MERGEABLE:
        raise ConfigError(
            f"'{name}' is stored as {str(base.dtype).removeprefix('torch.')}, not in 16 or 32 bits.",
            "Merge onto the 16-bit original of this base: --base PATH",
        )
    for shape in _shapes(change, base.shape):
        if shape != base.shape:
            raise ConfigError(
                f"'{name}' is {list(base.shape)} in the base and {list(shape)} in the adapter.", _OWN_BASE
            )


def _shapes(change: Change, base: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The base's shape as each part of the change has it."""
    if change.replaced is not None:
        yield change.replaced.shape
    if change.low_rank is not None:
        yield change.low_rank.shape
        if change.low_rank.magnitude is not None:
            out = change.low_rank.b.shape[0]
            yield base if change.low_rank.magnitude.shape == (out,) else change.low_rank.magnitude.shape
    if change.added is not None:
        yield change.added.shape
    if change.token_rows is not None:
        inside = all(0 <= token < base[0] for token in change.token_ids)
        yield (base[0] if inside else 1 + max(change.token_ids), *change.token_rows.shape[1:])


def _why_absent(name: str, converters: list[Any]) -> str:
    if name.endswith(".bias"):
        return "its layer has no bias there, and plain transformers would not load one"
    if any(hasattr(entry, "operations") for entry in converters):
        return "it belongs to another model, or transformers has it under another name in memory than on disk"
    return "it belongs to another model"


def _converters(config: Any) -> list[Any]:
    """How transformers renames or fuses this kind of model's tensors when it loads them."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return list(get_checkpoint_conversion_mapping(config.model_type) or [])


def _made_by(converters: list[Any], name: str) -> str:
    """The operation that makes this tensor of others; "" where it is taken as it is stored."""
    for entry in converters:
        targets = [entry.target_patterns] if isinstance(entry.target_patterns, str) else entry.target_patterns
        if hasattr(entry, "operations") and any(re.search(_open(target), name) for target in targets):
            return ", ".join(type(operation).__name__ for operation in entry.operations)
    return ""


def _open(target: str) -> str:
    """A pattern of what a conversion writes, whose back references may be anything."""
    return re.sub(r"\\\d", ".*", target)
