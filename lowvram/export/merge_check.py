"""Checks a merged folder: its loss beside that of the adapter, on both bases it could be merged onto."""

from __future__ import annotations

import math
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from accelerate import PartialState

from lowvram.engine.batch import Batch
from lowvram.engine.config import QUANTIZED
from lowvram.engine.model import keep_nf4_layout
from lowvram.engine.source import ModelSource
from lowvram.errors import MergeError, OutOfMemoryError
from lowvram.export.held_out import rows_to_compare
from lowvram.export.merged_tensors import MergedTensors
from lowvram.export.quantized_values import values_as_trained
from lowvram.export.streamed_model import Ticks
from lowvram.export.verify import (
    LOGITS_AT_ONCE,
    Comparison,
    Lens,
    adapter_lens,
    loss_of,
    merged_lens,
    require_agreement,
)
from lowvram.planner.plan import Plan

_NAMES = {"base": "the base as it is stored", "nf4": "its NF4 values", "int8": "its int8 values"}


class MergeCheck:
    """Made before the merge: bad data and models that cannot be verified are refused with nothing written."""

    def __init__(
        self, tensors: MergedTensors, adapter: Path, plan: Plan | None, onto: str, data: str | None
    ) -> None:
        self._tensors, self._adapter, self._plan, self._onto = tensors, adapter, plan, onto
        self._rows = rows_to_compare(tensors.source, plan, data)
        self._device, self._ticks = PartialState().device, Ticks()
        self._lenses = {base: self._adapter_lens(base) for base in self._bases()}
        self.losses: dict[str, float] = {}  # base's name -> loss of the unmerged adapter on it
        self.comparison: Comparison | None = None
        self.quantized_loss: float | None = None

    @property
    def place(self) -> str:
        return "host" if self._device.type == "cpu" else "device"

    def working_bytes(self) -> int:
        """The largest module as stored and in float32, and logits."""
        largest = max(prod(self._tensors.shape(name)) for name in self._tensors.names)
        return 6 * largest + 5 * 4 * LOGITS_AT_ONCE

    def run(self, folder: Path, say: Callable[[int, int], None], quantized: bool = False) -> None:
        """Compare what was written with base and adapter.

        Args:
            quantized: the folder is in 4 bits: its loss is measured, and no agreement asked for.

        Raises:
            MergeError: they differ by more than rounding explains.
            OutOfMemoryError: the device has no room for the largest module in float32.
        """
        try:
            self._ticks.say = say
            self._run(folder, quantized)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                "The device has too little free memory to verify the merged model, one module at a time.",
                "Close other programs on the card, or merge with --no-verify.",
            ) from error

    def _run(self, folder: Path, quantized: bool) -> None:
        batch = self._rows.batch
        source = ModelSource(str(folder), self._tensors.source.trust_remote_code)
        if quantized:
            self.losses = {base: loss_of(lens, batch) for base, lens in self._lenses.items()}
            self.quantized_loss = _quantized_loss(source, self._device, batch)
            return
        merged = merged_lens(source, self._device, self._ticks)
        self.comparison = require_agreement(self._tensors, self._lenses[self._onto], merged, folder, batch)
        self.losses = {
            base: self.comparison.adapter_loss if base == self._onto else loss_of(lens, batch)
            for base, lens in self._lenses.items()
        }

    def _bases(self) -> list[str]:
        trained = self._plan.base_precision if self._plan else ""
        return ["base", trained] if trained in QUANTIZED else ["base"]

    def _adapter_lens(self, base: str) -> Lens:
        values = None
        if base != "base" and self._plan is not None:
            values = values_as_trained(self._tensors, self._plan.step)
        return adapter_lens(self._tensors, self._adapter, self._device, self._ticks, values)

    def lines(self, *, for_others: bool = False) -> list[str]:
        """What was found.

        Args:
            for_others: not on this screen: without what names a folder here.
        """
        why = f" ({self._rows.why})" if self._rows.why and not for_others else ""
        said = [f"Verified on {self._rows.what}{why}, in float32, adapter unmerged by peft:"]
        for base, loss in self.losses.items():
            trained = " (as it was trained)" if base != "base" else ""
            said.append(f"  adapter on {_NAMES[base]}{trained}: loss {loss:.4f}")
        if (found := self.comparison) is not None:
            said.append(
                f"  merged onto {_NAMES[self._onto]}: loss {found.merged_loss:.4f}, "
                f"{found.loss_difference:+.6f} from its adapter; logits: cosine {found.cosine:.6f}, "
                f"max error {found.max_error:.3g}"
            )
        if self.quantized_loss is not None:
            difference = self.quantized_loss - self.losses[self._onto]
            said.append(
                f"  merged and quantised again: loss {self.quantized_loss:.4f}, {difference:+.4f} from the "
                f"adapter on {_NAMES[self._onto]}"
            )
        return said + self._choice()

    def _choice(self) -> list[str]:
        """Both bases are honest: say what the other one would give."""
        others = [base for base in self.losses if base != self._onto]
        if not others:
            return []
        difference = self.losses[others[0]] - self.losses[self._onto]
        return [f"  --onto {others[0]} would give {difference:+.4f} of loss on these rows"]


def _quantized_loss(source: ModelSource, device: torch.device, batch: Batch) -> float:
    """Of a 4-bit folder as plain transformers runs it."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if source.config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_pretrained(source.name, device_map={"": str(device)}).eval()
    keep_nf4_layout(model)  # whose CPU kernels take no row that is no multiple of 64
    loss = loss_of(Lens(model, device), batch)
    if not math.isfinite(loss):
        raise MergeError(
            "The quantised model's loss is no number; it was removed.", "Leave --quantized-base out."
        )
    return loss
