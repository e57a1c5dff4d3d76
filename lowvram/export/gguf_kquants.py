"""Q4_K_M and its like: which tensor gets which blocks, and the blocks, made by an installed ggml.

The k-quants' search for scales is ggml's own (github.com/ggml-org/llama.cpp, ggml_quantize_chunk of ggml.h);
the gguf package only reads them. Called tensor by tensor, no 16-bit copy of the model is written first.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from lowvram.export.gguf_types import Bytes, FileType, Quantize, fits, n_bytes

NO_QUANTIZER = (
    "Install one: pip install xllamacpp; or build llama.cpp's and give it: --quantizer PATH/llama-quantize; "
    "or take --type q8_0, which needs none."
)
_MODULE = "xllamacpp.xllamacpp"  # a wheel on PyPI with llama.cpp in one shared object
# What llama.cpp takes where rows are no multiple of 256: blocks of 32 with about as many bits.
_SMALLER = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}


def ggml_quantize() -> Quantize | None:
    """ggml's quantizer, None where no installed package brings it."""
    try:
        library = ctypes.CDLL(str(importlib.import_module(_MODULE).__file__))
        chunk = library.ggml_quantize_chunk
    except (ImportError, OSError, AttributeError):
        return None
    floats, size = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, size, size, size, floats]
    chunk.restype = ctypes.c_size_t

    def quantize(value: torch.Tensor, kind: Type) -> Bytes:
        source = value.float().contiguous()
        out = np.empty(n_bytes(kind, tuple(source.shape)), dtype=np.uint8)
        rows, width = source.numel() // source.shape[-1], source.shape[-1]

        def some(start: int, stop: int) -> int:
            first = start * width
            place = int(kind), source.data_ptr(), out.ctypes.data, first
            return int(chunk(*place, stop - start, width, None))

        cuts = np.linspace(0, rows, torch.get_num_threads() + 1).astype(int).tolist()
        with ThreadPoolExecutor() as threads:  # the search for scales is arithmetic, and ctypes frees Python
            assert sum(threads.map(some, cuts[:-1], cuts[1:])) == out.nbytes
        return out

    return quantize


def mixed_types(kind: FileType, shapes: Mapping[str, tuple[int, ...]], n_layers: int) -> dict[str, Type]:
    """Each tensor's type in a mixed file: llama.cpp's recipe of that name.

    The head (or the embedding that serves as one) has 6 bits; so have, in the M types, the values' and the
    MLP's last matrix of the first and the last eighth of the layers and of every third between.
    """
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    found = {}
    for name, shape in shapes.items():
        layer = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight", name)
        more = layer is not None and _more_bits(int(layer[1]), n_layers)
        chosen = Type.Q6_K if name == head or more else kind.main
        found[name] = _fitting(chosen, shape)
    return found


def _more_bits(layer: int, n_layers: int) -> bool:
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _fitting(kind: Type, shape: tuple[int, ...]) -> Type:
    if len(shape) < 2:
        return Type.F32
    if fits(kind, shape):
        return kind
    return _SMALLER[kind] if fits(_SMALLER[kind], shape) else Type.F16
