"""Adapters made from the frozen weights themselves: PiSSA, OLoRA, LoftQ."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from lowvram.engine.int8 import Int8Linear
from lowvram.engine.nf4 import nf4_values
from lowvram.engine.singular import largest
from lowvram.engine.source import ModelSource, local_shards, read_safetensors_header
from lowvram.errors import ConfigError

_ROUNDS = 16  # of power iteration, as in PiSSA's own fast decomposition, peft's pissa_niter_16
_MORE = 4  # times the rank is decomposed, so that the first r are right

Factors = tuple[torch.Tensor, torch.Tensor]  # A [r, in] and B [out, r]
Original = Callable[[str], torch.Tensor]  # a layer's name -> its weight before it was quantised, [out, in]


def weight_of(base_layer: Any) -> torch.Tensor:  # -> [out, in]
    """The weight as the layer multiplies with it: dequantised, and Conv1D's turned."""
    if isinstance(base_layer, Int8Linear):
        return base_layer.values()
    if hasattr(base_layer.weight, "quant_state"):
        return nf4_values(base_layer)
    weight: torch.Tensor = base_layer.weight.detach()
    return weight.t() if isinstance(base_layer, Conv1D) else weight


def pissa(weight: torch.Tensor, rank: int, scaling: float, seed: int) -> Factors:  # [out, in]
    """s B A = the best rank-r approximation of W, shared evenly (PiSSA, arXiv 2404.02948, equations 2 and 3).

    The paper's W_res = W - s B A is what our difference leaves of W. On a quantised base W is what the base
    holds: QPiSSA would quantise W_res instead, whose error is smaller, and lose the shared base.
    """
    found = largest(weight, _MORE * rank, _ROUNDS, seed)
    root = (found.s[:rank] / scaling).sqrt()  # [r]
    return root[:, None] * found.v[:, :rank].t(), found.u[:, :rank] * root


def olora(weight: torch.Tensor, rank: int) -> Factors:  # [out, in]
    """B = the first r columns of Q and A = the first r rows of R, W = Q R (OLoRA, arXiv 2406.01775).

    Householder's first r columns of Q are those of W's first r columns alone, and R = Q^T W: in place of Q
    and R, as large as W, this makes r columns and r rows.
    """
    q = torch.linalg.qr(weight[:, :rank])[0]  # [out, r]
    return q.t() @ weight, q


def loftq(lost: torch.Tensor, rank: int, scaling: float, seed: int) -> Factors:  # [out, in]
    """s B A = the best rank-r approximation of what quantising lost, W - dequant(quant(W)).

    One round of LoftQ (arXiv 2310.08659, algorithm 1), as peft's replace_lora_weights_loftq does; which
    leaves out the scaling, so that there the loss is repaired s times over.
    """
    return pissa(lost, rank, scaling, seed)


class OriginalWeights:
    """A model's 16-bit weights on disk, one at a time."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Name of a tensor -> the file that has it."""
        shards = local_shards(_folder(self._source))
        return {name: shard for shard in shards for name in read_safetensors_header(shard)}

    def __call__(self, name: str) -> torch.Tensor:  # -> [out, in] as the file has it
        """Of a layer named as in the adapted model.

        Raises:
            ConfigError: the files have no such weight.
        """
        own = name.removeprefix("base_model.model.") + ".weight"
        for known in (own, own.partition(".")[2]):  # GPT-2's files lack "transformer."
            if known in self._files:
                with safe_open(self._files[known], framework="pt") as tensors:
                    weight: torch.Tensor = tensors.get_tensor(known)
                return weight
        raise ConfigError(
            f"LoftQ needs '{own}' as it was before it was quantised, and the files of "
            f"'{self._source.name}' do not have it.",
            "Use another --init: lora_ga and pissa need the quantised weights only.",
        )


def _folder(source: ModelSource) -> Path:
    if source.is_local:
        return Path(source.name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source.name, local_files_only=True, allow_patterns=["*.safetensors*"]))
