"""Loading through transformers that quantises each weight to int8 rows as it arrives on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowvram.engine.int8 import Int8Linear, quantized_rows
from lowvram.engine.linears import in_out_features, replace_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_METHOD = "lowvram_int8"


def replace_by_int8(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Every linear layer that NF4 would quantise becomes an Int8Linear without weights."""

    def make(module: Any) -> Int8Linear:
        sizes, bias = in_out_features(module), module.bias is not None
        return Int8Linear(*sizes, bias=bias, compute_dtype=compute_dtype)

    replace_linears(model, make)


class Int8Config(QuantizationConfigMixin):  # type: ignore[misc]  # transformers ships no types
    """What from_pretrained takes as its quantization_config."""

    def __init__(self, compute_dtype: torch.dtype) -> None:
        self.quant_method = _METHOD
        self.compute_dtype = compute_dtype


@register_quantizer(_METHOD)
class _Int8Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers ships no types
    """transformers' own way in for other quantisers: one source weight at a time is on the device.

    Its loader for bitsandbytes' 8 bits moves every weight from the device back to the host and from there
    to the device again, in float16.
    """

    is_trainable = True

    def is_serializable(self) -> bool:
        return False

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        path, _dot, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), Int8Linear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize()

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        replace_by_int8(model, self.quantization_config.compute_dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        self.remove_quantization_config(model)  # peft would call it bitsandbytes' in an adapter's README
        return model


class _Quantize(ConversionOps):  # type: ignore[misc]  # transformers ships no types
    """A weight of the file to int8 rows and their scales; one of another shape to nothing."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, nn.Parameter]:
        made = {}
        for name, weight in input_dict.items():
            weight = weight[0] if isinstance(weight, list) else weight
            path = name.removesuffix(".weight")
            module = model.get_submodule(path)
            weight = weight.T if issubclass(module.source_cls, Conv1D) else weight  # [out, in]
            if weight.shape != module.weight.shape:  # transformers does not ask what is quantised
                continue  # so it counts as missing
            values, scale = quantized_rows(weight)
            made[name] = nn.Parameter(values, requires_grad=False)
            made[f"{path}.scale"] = nn.Parameter(scale, requires_grad=False)
        return made
