"""torch's dropout with the mask that our LoRA draws, so that peft's layers can be compared with ours."""

from __future__ import annotations

import torch
from torch import nn

from lowvram.engine.lora import dropped_places


class SameDropout(nn.Dropout):
    """A mask of all elements, from the places that our layer drops on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # nn.Dropout's own name for it
        if not self.training:
            return input
        kept = torch.ones(input.numel(), dtype=input.dtype)
        kept[dropped_places(input.numel(), self.p, input.device)] = 0
        return input * kept.view(input.shape) / (1 - self.p)
