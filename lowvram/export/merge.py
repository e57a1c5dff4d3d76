"""Writes base + adapter as a plain model folder, piece by piece, whole or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowvram.engine.source import ModelSource
from lowvram.export.adapter_changes import MERGEABLE
from lowvram.export.base_files import write_rest
from lowvram.export.empty_model import empty_model
from lowvram.export.merged_tensors import MergedTensors
from lowvram.export.partial_folder import refuse_used, require_disk, whole_or_not_at_all
from lowvram.export.rest_check import require_loadable_rest
from lowvram.export.shards import NamedPieces, Progress, write_shards
from lowvram.frozen import Frozen
from lowvram.units import GiB

SHARD_BYTES = 4 * GiB


class MergeResult(Frozen):
    """What was written."""

    folder: Path
    n_tensors: int
    n_merged: int
    n_bytes: int


def merge_adapter(
    base: ModelSource,
    adapter: Path,
    output: Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> MergeResult:
    """Base + adapter in the base's own dtypes.

    Raises:
        ConfigError: the output is in use, the adapter belongs to another base or is of an unsupported kind.
        DoesNotFitError: too little disk.
    """
    refuse_used(output)
    tensors = MergedTensors.open(base, adapter)
    return write_merged(tensors, adapter, output, max_shard_bytes=max_shard_bytes, progress=progress)


def write_merged(
    tensors: MergedTensors,
    adapter: Path | None,
    output: Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    check: Callable[[Path], object] = lambda _: None,
) -> MergeResult:
    """Plain safetensors with config, tokenizer and licence; memory is `tensors.working_bytes()`.

    Args:
        check: looks at the finished folder before it takes its name; what it raises removes the folder.

    Raises:
        ConfigError: the output is in use, or transformers would not load its configs or tokenizer.
        DoesNotFitError: too little disk.
    """
    n_bytes = sum(map(tensors.n_bytes, tensors.names))
    require_disk(output, n_bytes)
    changes = config_changes(tensors)
    require_loadable_rest(tensors.source, adapter, changes)
    with whole_or_not_at_all(output) as partial:
        pieces = [_named(tensors, name) for name in tensors.names]
        write_shards(pieces, partial, max_shard_bytes, progress or (lambda _done, _total: None))
        write_rest(tensors.folder, adapter, partial, changes)
        check(partial)
    return MergeResult(
        folder=output, n_tensors=len(tensors.names), n_merged=len(tensors.changed), n_bytes=n_bytes
    )


def _named(tensors: MergedTensors, name: str) -> NamedPieces:
    return NamedPieces(name, tensors.dtype(name), tensors.shape(name), lambda: tensors.pieces(name))


def config_changes(tensors: MergedTensors) -> dict[str, Any]:
    """What config.json has to say otherwise than the base's."""
    changes: dict[str, Any] = {"dtype": str(_main_dtype(tensors)).removeprefix("torch.")}
    if tensors.untied:
        changes["tie_word_embeddings"] = False
    if not tensors.source.config.architectures:
        changes["architectures"] = [type(empty_model(tensors.source)).__name__]
    return changes


def _main_dtype(tensors: MergedTensors) -> torch.dtype:
    """In which most of the model is stored."""
    sizes: Counter[torch.dtype] = Counter()
    for name in tensors.names:
        sizes[tensors.dtype(name)] += tensors.n_bytes(name)
    return max((dtype for dtype in MERGEABLE), key=lambda dtype: sizes[dtype])
