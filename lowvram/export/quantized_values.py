"""The base as a quantised run saw it: each linear layer's weight quantised and read back, by rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, prod
from typing import TYPE_CHECKING

import torch

from lowvram.engine.int8 import quantized_rows, row_values
from lowvram.engine.linears import is_turned
from lowvram.engine.model import DTYPES, NESTED_BLOCK, NF4_BLOCK, skeleton
from lowvram.engine.vocabulary import without_vocabulary_levers
from lowvram.export.tensor_files import PIECE_NUMBERS, StoredTensor, name_in_file

if TYPE_CHECKING:
    from lowvram.engine.config import StepConfig
    from lowvram.export.merged_tensors import BaseValues, MergedTensors


def quantized_linears(tensors: MergedTensors, step: StepConfig) -> dict[str, bool]:
    """Weights that a base of `step`'s precision keeps in few bits, and whether each lies as [in, out].

    Embedding and head are none of them, also where a lever quantised the head.
    """
    model = skeleton(tensors.source.config, without_vocabulary_levers(step))
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "source_cls")}
    stored = set(tensors.names)
    return {name_in_file(f"{name}.weight", stored): is_turned(module) for name, module in linears.items()}


def values_as_trained(tensors: MergedTensors, step: StepConfig) -> BaseValues:
    """What an NF4 or int8 base of `step` shows of each tensor; all others as stored.

    The weight is rounded to the compute dtype first, as loading it for training does.
    """
    linears, dtype = quantized_linears(tensors, step), DTYPES[step.compute_dtype]

    def values(name: str, stored: StoredTensor) -> StoredTensor | WholeRows | Nf4Rows | Int8Rows:
        if name not in linears:
            return stored
        if linears[name]:  # quantised along the other dimension: GPT-2, whose tensors are small
            turned = WholeRows(stored.whole().to(dtype).T.contiguous())
            return WholeRows(_quantized(turned, step, dtype).rows(0, turned.shape[0]).T)
        return _quantized(stored, step, dtype)

    return values


def _quantized(weight: StoredTensor | WholeRows, step: StepConfig, dtype: torch.dtype) -> Nf4Rows | Int8Rows:
    if step.base_precision == "int8":
        return Int8Rows(weight, dtype)
    return Nf4Rows(weight, dtype, step.levers.double_quantization)


@dataclass(frozen=True)
class WholeRows:
    """A tensor in memory, read as a stored one is."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.tensor[start:stop]

    def spans(self, multiple: int = 1) -> Iterator[tuple[int, int]]:  # noqa: ARG002  one piece is all
        yield 0, self.tensor.shape[0]


class Int8Rows:
    """Row-wise absmax int8, as engine/int8.py makes it; rows know nothing of each other."""

    def __init__(self, weight: StoredTensor | WholeRows, dtype: torch.dtype) -> None:
        self._weight, self._dtype = weight, dtype
        self.shape = weight.shape

    def rows(self, start: int, stop: int) -> torch.Tensor:
        values, scale = quantized_rows(self._weight.rows(start, stop).to(self._dtype))
        return row_values(values, scale, self._dtype)

    def spans(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        return self._weight.spans(multiple)


class Nf4Rows:
    """bitsandbytes' NF4 of a whole weight [out, in], quantised and read back some rows at a time.

    Blocks of 64 lie along the flattened weight, so rows are taken in multiples that end with a block. Under
    double quantisation the scales, 1/64 of the numbers, are quantised together: they share one mean.
    """

    def __init__(self, weight: StoredTensor | WholeRows, dtype: torch.dtype, double: bool) -> None:
        from bitsandbytes.functional import quantize_4bit

        self.shape, self._dtype = weight.shape, dtype
        self._multiple = NF4_BLOCK // gcd(NF4_BLOCK, self._width)
        packed, scales = [], []
        for start, stop in weight.spans(self._multiple):
            part = weight.rows(start, stop).to(dtype).contiguous()
            bits, state = quantize_4bit(part, blocksize=NF4_BLOCK, quant_type="nf4")
            packed.append(bits.flatten())
            scales.append(state.absmax)
        self._packed, self._scales = torch.cat(packed), torch.cat(scales)  # 1/2 byte, 4/64 bytes a number
        if double:
            self._scales = _nested(self._scales)

    @property
    def _width(self) -> int:
        return prod(self.shape[1:])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

        first, end = start * self._width, stop * self._width
        state = QuantState(
            absmax=self._scales[first // NF4_BLOCK : -(-end // NF4_BLOCK)],
            shape=torch.Size((end - first,)),  # flat: bnb's CPU kernel mixes up scales of rows of 96 numbers
            code=get_4bit_type("nf4", device="cpu"),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=self._dtype,
        )
        flat: torch.Tensor = dequantize_4bit(self._packed[first // 2 : -(-end // 2)][:, None], state)
        return flat.reshape(stop - start, *self.shape[1:])

    def spans(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        step = self._multiple * multiple
        n_rows = max(PIECE_NUMBERS // max(self._width, 1) // step, 1) * step
        for start in range(0, self.shape[0], n_rows):
            yield start, min(start + n_rows, self.shape[0])


def _nested(scales: torch.Tensor) -> torch.Tensor:  # [n] -> [n]
    """As bitsandbytes reads double-quantised scales back: without their mean in 8 bits, in blocks of 256."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    mean = scales.mean()
    bits, state = quantize_blockwise(scales - mean, blocksize=NESTED_BLOCK)
    read: torch.Tensor = dequantize_blockwise(bits, state)
    return read + mean
