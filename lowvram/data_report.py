"""Data report: what `lowvram data check` finds out about a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lowvram.cache import data_folder
from lowvram.data.prepared import folder_bytes, prepare_rows
from lowvram.data.row_store import Examples, RowStore
from lowvram.data.shapes import SHAPES, Reading
from lowvram.data.split import split_store
from lowvram.data.stats import quantiles
from lowvram.data.tokens import template_name
from lowvram.data.work_force import Progress
from lowvram.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LISTED = 20


@dataclass(frozen=True)
class Report:
    """The facts, and the rows behind them."""

    facts: dict[str, Any]
    store: RowStore
    train: Examples
    tokenizer: PreTrainedTokenizerBase | None

    def require_usable(self, reading: Reading) -> None:
        """Raises: DataError when rows cannot be used and nobody said to skip them."""
        bad = self.store.first_bad()
        if bad and not reading.skip_bad:
            raise DataError(bad.message, "Mend or remove them, or leave them out: --skip-bad.")


def report_on(
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    reading: Reading,
    seq_len: int | None,
    progress: Progress,
    pairs: bool = False,
) -> Report:
    """Read everything; with a tokenizer, count tokens; of `pairs` the lengths are those of the sources.

    Raises:
        DataError: nothing readable there, or fewer than two different examples beside bad rows.
    """
    store = prepare_rows(name, reading, tokenizer, progress, pairs=pairs, keep_bad=True)
    train, held_out = split_store(store)
    facts = _of_rows(store, train, held_out)
    if tokenizer is None:
        facts |= _lengths(store.characters, "characters")
    else:
        facts |= _of_tokens(train, tokenizer)
        facts |= _of_cut(store, seq_len) if seq_len else {}
    return Report(facts | _of_cache(store), store, train, tokenizer)


def _of_rows(store: RowStore, train: Examples, held_out: Examples) -> dict[str, Any]:
    known = store.entry.known
    bad = len(store.bad_rows)
    return {
        "data": store.entry.name,
        "shape": known.shape,
        "shape_found": bool(known.first),
        "fields": [known.fields.get(field, field) for field in SHAPES[known.shape].needs],
        "unread_fields": list(store.entry.unread),
        "rows": len(store) + bad,
        "examples": len(store),
        "examples_trained": len(train),
        "held_out": len(held_out),
        "duplicates": len(store) - store.n_different(),
        "bad_rows": bad,
        "bad": list(store.problems(_LISTED)),
    }


def _lengths(values: Any, unit: str) -> dict[str, int]:
    at = quantiles(values)
    return {f"{unit}_median": at[50], f"{unit}_95_percent": at[95], f"{unit}_longest": at[100]}


def _of_tokens(train: Examples, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    tokens, trained, pairs = train.n_tokens, int(train.n_trained.sum()), train.store.entry.pairs
    return {
        "chat_template": template_name(tokenizer),
        "tokens": tokens,
        "trained_share": round(trained / tokens, 4),
        "masked_share": round(1 - trained / tokens, 4),
        "skipped_turns": int(train.skipped_turns.sum()),
        **_lengths(train.lengths, "source_tokens" if pairs else "tokens"),
        **(_lengths(train.n_trained, "target_tokens") if pairs else {}),
    }


def _of_cut(store: RowStore, seq_len: int) -> dict[str, int]:
    """What is lost at `seq_len` tokens, of all examples."""
    lengths = store.lengths
    over = np.maximum(lengths - seq_len, 0)
    lost = store.answer_starts >= seq_len
    return {
        "seq_len": seq_len,
        "examples_cut": int(((over > 0) & ~lost).sum()),
        "examples_lost": int(lost.sum()),
        "tokens_cut": int(over[~lost].sum() + lengths[lost].sum()),
    }


def _of_cache(store: RowStore) -> dict[str, Any]:
    return {
        "prepared_bytes": folder_bytes(store.folder),
        "cache": str(data_folder()),
        "cache_bytes": folder_bytes(data_folder()),
    }
