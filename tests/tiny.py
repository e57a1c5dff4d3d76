"""Tiny real architectures: shape, examples, statistics, and the loss as plain transformers computes it."""

from __future__ import annotations

from typing import Any

import torch

from lowvram.data.stats import DataStats
from lowvram.data.tokens import Example

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}


def stats_of(
    lengths: tuple[int, ...], n_examples: int, trained_share: float, n_held_out: int, starts: tuple[int, ...]
) -> DataStats:
    """Of a data set whose examples' lengths and answers' starts lie at these 101 quantiles."""
    n_tokens = n_examples * sum(lengths) // len(lengths)
    return DataStats(
        source="d",
        shape="text",
        sha256="0",
        template="t",
        n_examples=n_examples,
        n_held_out=n_held_out,
        n_tokens=n_tokens,
        n_trained_tokens=int(trained_share * n_tokens),
        longest_tokens=lengths[-1],
        length_quantiles=lengths,
        answer_start_quantiles=starts,
    )


def examples(lengths: tuple[int, ...], seed: int = 0, first_id: int = 0) -> list[Example]:
    """Random tokens from `first_id` on, of which the last two thirds are trained."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in lengths:
        ids = torch.randint(first_id, SHAPE["vocab_size"], (n,), generator=generator).tolist()
        trained = [0] * (n // 3) + [1] * (n - n // 3)
        made.append(Example(tuple(ids), tuple(trained), "test:1"))
    return made


def plain_loss(model: Any, rows: list[Example]) -> torch.Tensor:
    """Mean over all trained tokens of all examples, one example at a time, by transformers' own logits."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example in rows:
        ids = torch.tensor([list(example.input_ids)])
        labels = torch.tensor(
            [i if t else -100 for i, t in zip(example.input_ids, example.trained, strict=True)]
        )
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    return total / count
