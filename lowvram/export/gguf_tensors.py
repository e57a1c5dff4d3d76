"""Which tensors a GGUF holds, under llama.cpp's names, and their values as llama.cpp computes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lowvram.errors import ConfigError
from lowvram.export.gguf_architectures import MERGE_INSTEAD, Architecture
from lowvram.export.gguf_hyperparameters import rope_factors
from lowvram.export.tensors import Tensors

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PIECE_ROWS = 1024  # of at most 8,192 features that is 32 MB in float32
_BUFFERS = (".rotary_emb.inv_freq",)  # old files store what transformers computes


@dataclass(frozen=True)
class Placed:
    """One tensor of the file to be."""

    name: str
    shape: tuple[int, ...]
    source: Callable[[], Iterable[torch.Tensor]]  # as stored, some rows at a time
    order: torch.Tensor | None = None  # from which row of the source each row comes
    offset: float = 0.0

    def pieces(self) -> Iterator[torch.Tensor]:
        """The values in float32, some rows at a time; only reordered ones are there as a whole first."""
        stored = self.source()
        if self.order is not None:
            stored = _split(torch.cat(list(stored)), self.order)
        for piece in stored:
            yield piece.float() + self.offset if self.offset else piece.float()


def _split(whole: torch.Tensor, order: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, len(order), PIECE_ROWS):
        yield whole[order[start : start + PIECE_ROWS]]


def placed(tensors: Tensors, config: Any, architecture: Architecture) -> list[Placed]:
    """The tensors in the order of the source files; nothing is read but, where both are there, tied ends.

    Raises:
        ConfigError: a tensor that the architecture does not have.
    """
    names = [name for name in tensors.names if not name.endswith(_BUFFERS)]
    if HEAD in names and config.tie_word_embeddings and _same(tensors, HEAD, EMBEDDING):
        names.remove(HEAD)  # llama.cpp takes the embedding where there is no head
    renamed = architecture.renamed(names, config.num_hidden_layers)
    unknown = [name for name in names if name not in renamed]
    if unknown:
        raise ConfigError(f"llama.cpp's {architecture.name} has no place for {unknown[:3]}.", MERGE_INSTEAD)
    found = [_placed(renamed[name], name, tensors, config, architecture) for name in names]
    factors = rope_factors(config)
    if factors is not None:
        found.append(Placed("rope_freqs.weight", tuple(factors.shape), lambda: [factors]))
    return found


def _placed(new: str, name: str, tensors: Tensors, config: Any, architecture: Architecture) -> Placed:
    shape = tensors.shape(name)
    offset = architecture.norm_offset if name.endswith("norm.weight") else 0.0
    order = row_order(name, shape[0], config, architecture)
    return Placed(new, shape, partial(tensors.pieces, name), order, offset)


def _same(tensors: Tensors, one: str, other: str) -> bool:
    if tensors.shape(one) != tensors.shape(other):
        return False
    return all(map(torch.equal, tensors.pieces(one), tensors.pieces(other)))


def row_order(name: str, n_rows: int, config: Any, architecture: Architecture) -> torch.Tensor | None:
    """From which row of transformers' q or k each of llama.cpp's comes; None where they are the same.

    Rotary positions turn pairs of features: transformers i with i + d/2 of a head of d, llama.cpp's Llama 2i
    with 2i + 1. So the two halves of a head are dealt out alternately.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = name.split(".")[-2]
    if not architecture.neighbours or module not in heads:
        return None
    halves = torch.arange(n_rows).view(heads[module], 2, -1)  # [heads, 2, d/2]
    return halves.transpose(1, 2).reshape(-1)
