"""Values as JSON that come back as they were: tuples, keys that are numbers, and a place for each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# {"a": (1, None), 0: tensor} becomes
# {"dict": [["a", {"tuple": [1, null]}], [0, {"tensor": "0"}]]}: JSON alone would make a list of the tuple
# and text of the key 0, and an optimizer's `state` has such keys.


def encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON; its tensors go to `tensors`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        while place in tensors:  # the keys 0 and "0" have the same place
            place += "'"
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, (list, tuple)):
        items = [encode(item, _join(place, index), tensors) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping) and all(isinstance(key, (str, int)) for key in value):
        return {"dict": [[key, encode(item, _join(place, key), tensors)] for key, item in value.items()]}
    raise TypeError(f"a checkpoint cannot hold the {type(value).__name__} at {place or 'its top'}")


def _join(place: str, key: object) -> str:
    return f"{place}/{key}" if place else str(key)


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(decode(item, tensors) for item in content)
    return {key: decode(item, tensors) for key, item in content}
