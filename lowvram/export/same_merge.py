"""Whether a folder holds already what a merge would write to it."""

from __future__ import annotations

from pathlib import Path

from lowvram.errors import ConfigError
from lowvram.export.merged_tensors import MergedTensors
from lowvram.export.tensor_files import StoredTensor, tensors_of_folder
from lowvram.export.verify import same_bits


def is_this_merge(tensors: MergedTensors, folder: Path) -> bool:
    """Compares every tensor's name, type, shape and first million numbers, computed anew.

    Those tell one adapter or base from another, whatever the folder's files say of their origin: of a 7B, 0.3
    of 7 billion numbers. A merge that was killed has no folder of this name.
    """
    if not (folder / "config.json").is_file():
        return False
    try:
        written = tensors_of_folder(folder)
    except ConfigError:  # another kind of folder, or a damaged one
        return False
    same_names = written.keys() == set(tensors.names)
    return same_names and all(_begins_alike(tensors, name, written[name]) for name in tensors.names)


def _begins_alike(tensors: MergedTensors, name: str, written: StoredTensor) -> bool:
    if (written.shape, written.dtype) != (tensors.shape(name), tensors.dtype(name)):
        return False
    first = next(tensors.pieces(name), None)  # None of a tensor without rows
    return first is None or same_bits(first, written.rows(0, first.shape[0] if first.ndim else 1))
