"""How far each merged layer is from peft's own output of it: names the tensor that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from transformers.pytorch_utils import Conv1D

from lowvram.export.tensor_files import StoredTensor, name_in_file, tensors_of_folder

_ROWS = 128  # of a batch: enough for a mean error, a small part of the layer's own work
_EXACT = 2e-4  # what float32 sums of some thousand products differ by


class LayerErrors:
    """Looks at the adapted linear layers of an unmerged peft model while it runs.

    Rounding each weight once changes w by at most eps / 2 of its size, up or down: an output's error is then
    at most eps / 2 * sqrt(sum w^2 x^2), whatever cancels in the output itself. That root is the measure.
    """

    def __init__(self, model: Any, merged: Path, device: torch.device) -> None:
        self._stored = tensors_of_folder(merged)
        self._device = device
        self.errors: dict[str, float] = {}  # tensor name -> error over that measure
        self._hooks = [
            module.register_forward_hook(lambda m, x, y, name=name: self._look(m, name, x[0], y))
            for name, module in model.named_modules()
            if isinstance(module, LoraLinear)
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def worst(self) -> tuple[str, float, float]:
        """Tensor name, error, and the error that rounding explains, where the two are farthest apart."""
        if not self.errors:
            return "", 0.0, 1.0
        name = max(self.errors, key=lambda name: _rank(self.errors[name]) / self._allowed(name))
        return name, self.errors[name], self._allowed(name)

    def _allowed(self, name: str) -> float:
        return torch.finfo(self._stored[name].dtype).eps / 2 + _EXACT

    @torch.no_grad()
    def _look(self, module: Any, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """`x` [.., in] went in, `y` [.., out] came out of peft's layer."""
        path = name.removeprefix("base_model.model.")
        weight_name, bias_name = (name_in_file(f"{path}.{kind}", self._stored) for kind in ("weight", "bias"))
        weight = self._read(self._stored[weight_name])
        weight = weight.T if isinstance(module.get_base_layer(), Conv1D) else weight  # [out, in]
        bias = self._read(self._stored[bias_name]) if bias_name in self._stored else None
        rows, wanted = x.flatten(0, -2)[:_ROWS].float(), y.flatten(0, -2)[:_ROWS].float()
        found = F.linear(rows, weight, bias)
        squares = F.linear(rows.square(), weight.square(), None if bias is None else bias.square())
        self.errors[weight_name] = float((found - wanted).norm() / squares.sum().sqrt())

    def _read(self, stored: StoredTensor) -> torch.Tensor:
        return stored.whole().to(self._device, torch.float32)


def _rank(error: float) -> float:
    """No number is worse than every number."""
    return error if error == error else float("inf")
