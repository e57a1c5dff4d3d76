"""MergedTensors: base and adapter as one model's tensors, computed from the files when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.adapter_changes import MERGEABLE, changes_of
from lowvram.export.adapter_files import read_adapter
from lowvram.export.base_files import base_folder
from lowvram.export.tensor_changes import Change, LowRank, Rows
from lowvram.export.tensor_files import StoredTensor, tensors_of_folder
from lowvram.units import MiB

BaseValues = Callable[[str, StoredTensor], Rows]  # name, as stored -> as a quantised base shows it


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
        self._base_values: BaseValues | None = None

    @classmethod
    def open(cls, base: ModelSource, adapter: Path | None) -> MergedTensors:
        """Read the headers of base and adapter and match them; no number is read but those of a tied head.

        Raises:
            ConfigError: one of them is missing, damaged or pickled, or they do not belong together.
        """
        read = read_adapter(adapter) if adapter is not None else None
        source = ModelSource(str(base_folder(base)), base.trust_remote_code)
        _require_usual_files(source)
        stored = tensors_of_folder(Path(source.name))
        if read is None:
            return cls(source, {name: _Output(tensor, None) for name, tensor in stored.items()}, untied=False)
        changes, untied = changes_of(source, read, stored)
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

    @property
    def copied(self) -> list[str]:
        """Those that are written as they are in the base, bit for bit."""
        return [name for name, output in self._outputs.items() if self._is_copied(name, output)]

    def _is_copied(self, name: str, output: _Output) -> bool:
        same = output.change is None and self.dtype(name) == output.base.dtype
        return same and (self._base_values is None or output.base.dtype not in MERGEABLE)

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
        """The same some rows at a time: a 70B's head takes 2 MiB instead of 2 GiB."""
        output, dtype = self._outputs[name], self.dtype(name)
        base: Rows = output.base
        if self._is_copied(name, output) or dtype not in MERGEABLE:
            yield from (base.rows(*span) for span in base.spans())
            return
        if self._base_values is not None:
            base = self._base_values(name, output.base)
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
        bases = [output.base for output in self._outputs.values()]
        return working_bytes(bases, low_ranks, quantized=self._base_values is not None)


def working_bytes(
    tensors: Iterable[StoredTensor], low_ranks: Iterable[LowRank], *, quantized: bool = False
) -> int:
    """Of the largest piece and the largest pair of factors, which are 8 bytes a number: stored and float32.

    32 bytes for each number of a piece, and 36 MiB besides, are measured (benchmarks/merge.csv): as it is
    read, its update, their sum and what is written, of this piece and of the one before.

    Args:
        quantized: 4 bits and a scale of each number of the largest tensor are kept, and put together once.
    """
    shapes = [(tensor, prod(tensor.shape)) for tensor in tensors if tensor.n_bytes]
    pieces = [max(b - a for a, b in tensor.spans()) * n // tensor.n_rows for tensor, n in shapes]
    pairs = [pair.n_numbers for pair in low_ranks]
    largest = max((n for _, n in shapes), default=0)
    return 36 * MiB + 8 * max(pairs, default=0) + 32 * max(pieces, default=0) + quantized * 5 * largest // 4


def _require_usual_files(source: ModelSource) -> None:
    """A config may name its weights' file, which transformers then loads instead of all others."""
    named = getattr(source.config, "transformers_weights", None)
    if named is not None:
        raise ConfigError(
            f"'{source.name}/config.json' names its weights' file, {named}; lowvram reads the usual ones.",
            "Load it with transformers, save_pretrained it to another folder, and give that: --base PATH",
        )


def _outputs(
    stored: dict[str, StoredTensor], untied: dict[str, StoredTensor], changes: dict[str, Change]
) -> dict[str, _Output]:
    bases: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        bases[name] = untied.get(name, tensor)
        new = (other for other, base in untied.items() if base is tensor and other not in stored)
        bases.update(dict.fromkeys(new, tensor))
    return {name: _Output(base, changes.get(name)) for name, base in bases.items()}
