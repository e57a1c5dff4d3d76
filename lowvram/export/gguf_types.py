"""The number formats of a GGUF: what --type may say, what each tensor becomes, and its bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, LlamaFileType, quants
from gguf import GGMLQuantizationType as Type

from lowvram.errors import ConfigError
from lowvram.export.gguf_tensors import Placed

Bytes = npt.NDArray[np.uint8]
Quantize = Callable[[torch.Tensor, Type], Bytes]
_FLOATS = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class FileType:
    """What most matrices of a file become; `mixed` ones also use wider types (export/gguf_kquants.py)."""

    name: str
    code: LlamaFileType
    main: Type
    mixed: bool = False


_PLAIN = (
    FileType("f32", LlamaFileType.ALL_F32, Type.F32),
    FileType("f16", LlamaFileType.MOSTLY_F16, Type.F16),
    FileType("bf16", LlamaFileType.MOSTLY_BF16, Type.BF16),
    FileType("q8_0", LlamaFileType.MOSTLY_Q8_0, Type.Q8_0),
)
_MIXED = (
    FileType("q4_k_m", LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K, mixed=True),
    FileType("q5_k_m", LlamaFileType.MOSTLY_Q5_K_M, Type.Q5_K, mixed=True),
    FileType("q6_k", LlamaFileType.MOSTLY_Q6_K, Type.Q6_K, mixed=True),
)
FILE_TYPES = {found.name: found for found in (*_PLAIN, *_MIXED)}


def file_type(name: str) -> FileType:
    """The type of that name.

    Raises:
        ConfigError: there is none.
    """
    try:
        return FILE_TYPES[name.lower()]
    except KeyError:
        raise ConfigError(
            f"There is no GGUF type '{name}'.", f"Give one of {', '.join(FILE_TYPES)}."
        ) from None


def plain_type(kind: FileType, shape: tuple[int, ...]) -> Type:
    """Of one tensor in a file without a mix: 32 bits for vectors, 16 where blocks do not fill a row."""
    if len(shape) < 2:
        return Type.F32
    return kind.main if fits(kind.main, shape) else Type.F16


def fits(kind: Type, shape: tuple[int, ...]) -> bool:
    """Whether blocks of this type fill the rows."""
    block: int = GGML_QUANT_SIZES[kind][0]
    return shape[-1] % block == 0


def n_bytes(kind: Type, shape: tuple[int, ...]) -> int:
    """Of a tensor in this type."""
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    return prod(shape) // int(per_block) * int(block_bytes)


def encoded(tensor: Placed, kind: Type, quantize: Quantize | None = None) -> Bytes:
    """The bytes of a tensor in that type.

    Args:
        quantize: for the types with mixed blocks, which the gguf package reads but does not write.

    Raises:
        ConfigError: a value is too large for 16 bits with a 5-bit exponent.
    """
    out, at = np.empty(n_bytes(kind, tensor.shape), dtype=np.uint8), 0
    for piece in tensor.pieces():
        data = _encoded(tensor.name, piece, kind, quantize)
        out[at : at + data.size] = data
        at += data.size
    return out


def _encoded(name: str, piece: torch.Tensor, kind: Type, quantize: Quantize | None) -> Bytes:
    if kind == Type.F16 and float(piece.abs().max()) > _LARGEST_F16:
        raise ConfigError(
            f"'{name}' holds {float(piece.abs().max()):,.0f}; F16 ends at {_LARGEST_F16:,.0f}.",
            "Take a type with a wider exponent: --type bf16",
        )
    if kind in _FLOATS:
        return piece.to(_FLOATS[kind]).flatten().view(torch.uint8).numpy()
    if quantize is not None:
        return quantize(piece, kind)
    quantized: Bytes = quants.quantize(piece.numpy(), kind)
    return quantized.ravel()
