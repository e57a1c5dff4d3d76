"""Stats: what the planner has to know of a data set, in a few numbers."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import numpy.typing as npt
from pydantic import Field

from lowvram.data.row_store import Examples
from lowvram.data.shapes import Reading
from lowvram.frozen import Frozen


class DataStats(Frozen):
    """Counts of one tokenised data set, before anything is cut to a sequence length."""

    source: str = Field(description="the file or hub id, as given")
    shape: str
    shape_found: bool = Field(True, description="by the fields of the first row; false: told by the user")
    reading: Reading = Field(Reading(), description="how to read it again the same way")
    unread_fields: tuple[str, ...] = Field((), description="of the first row, of which nothing is made")
    n_skipped: int = Field(0, ge=0, description="rows left out that cannot be used")
    n_skipped_turns: int = Field(0, ge=0, description="assistant turns that the template rewrites: untrained")
    sha256: str = Field(description="of the content, whatever the file's name")
    template: str = Field(description="whose chat template rendered it")
    n_examples: int = Field(ge=1, description="examples trained on; held-out ones do not count")
    n_held_out: int = Field(ge=0)
    longest_held_out_tokens: int = Field(0, ge=0, description="longest held-out example")
    eval_source: str | None = Field(None, description="of the held-out examples, where they have their own")
    eval_sha256: str | None = Field(None, description="of its content")
    n_tokens: int = Field(ge=0, description="tokens of the examples trained on: one epoch")
    n_trained_tokens: int = Field(ge=0, description="those of n_tokens that the loss counts")
    longest_tokens: int = Field(ge=0, description="longest example trained on")
    length_quantiles: tuple[int, ...] = Field(
        min_length=101, max_length=101, description="tokens of an example trained on, at 0, 1, ... 100 %"
    )
    answer_start_quantiles: tuple[int, ...] = Field(
        min_length=101, max_length=101, description="tokens before the first trained one, at 0, 1, ... 100 %"
    )

    target_quantiles: tuple[int, ...] | None = Field(
        None, description="for an encoder-decoder, whose lengths are its sources': of its targets"
    )

    @property
    def mean_tokens(self) -> float:
        """Tokens of an average example."""
        return self.n_tokens / self.n_examples

    @property
    def trained_share(self) -> float:
        """Part of the tokens that the loss counts, 0 to 1."""
        return self.n_trained_tokens / self.n_tokens if self.n_tokens else 0.0

    def n_longer_than(self, seq_len: int) -> int:
        """About how many examples exceed `seq_len` tokens; exactly 0 when none does, else at least 1."""
        return self._n_above(self.length_quantiles, seq_len)

    def n_lost_at(self, seq_len: int) -> int:
        """About how many examples have no trained token within `seq_len` tokens; exactly 0 when all have."""
        return self._n_above(self.answer_start_quantiles, seq_len - 1)

    def _n_above(self, quantiles: tuple[int, ...], limit: int) -> int:
        if limit >= quantiles[100]:
            return 0
        if limit < quantiles[0]:
            return self.n_examples
        above = bisect_right(quantiles, limit)  # 1..100: the first quantile that is larger
        low, high = quantiles[above - 1], quantiles[above]
        percent = above - 1 + (limit - low) / (high - low)
        return max(1, round(self.n_examples * (1 - percent / 100)))


def data_stats(train: Examples, held_out: Examples, reading: Reading, template: str) -> DataStats:
    """The statistics of a prepared source, split; `template` as `template_name` says it.

    Args:
        held_out: of the same store, or of one of their own.
    """
    own = held_out.store is not train.store
    store, lengths = train.store, train.lengths
    known, pairs = store.entry.known, store.entry.pairs
    return DataStats(
        source=store.entry.name,
        shape=known.shape,
        shape_found=bool(known.first),
        reading=reading.model_copy(update={"shape": known.shape}),
        unread_fields=store.entry.unread,
        n_skipped=len(store.bad_rows) + (len(held_out.store.bad_rows) if own else 0),
        n_skipped_turns=int(train.skipped_turns.sum()),
        sha256=store.sha256(),
        template=template,
        n_examples=len(train),
        n_held_out=len(held_out),
        longest_held_out_tokens=int(held_out.lengths.max()),
        eval_source=held_out.store.entry.name if own else None,
        eval_sha256=held_out.store.sha256() if own else None,
        n_tokens=train.n_tokens,
        n_trained_tokens=int(train.n_trained.sum()),
        longest_tokens=int(lengths.max()),
        length_quantiles=quantiles(lengths),
        answer_start_quantiles=quantiles(train.answer_starts),
        target_quantiles=quantiles(train.n_trained) if pairs else None,
    )


def quantiles(values: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """Nearest-rank values at 0..100 %: the first is the shortest, the last the longest."""
    ascending, top = np.sort(values), len(values) - 1
    return tuple(int(ascending[round(top * percent / 100)]) for percent in range(101))
