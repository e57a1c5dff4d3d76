"""TrainingData: the plan's data as tokenised examples, split, cut and checked against the plan."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowvram.data.order import batches_of_epoch, steps_per_epoch
from lowvram.data.packed_order import pack
from lowvram.data.prepared import prepare_rows
from lowvram.data.row_store import Examples, RowStore
from lowvram.data.shapes import Reading
from lowvram.data.split import split_store
from lowvram.data.stats import DataStats, data_stats
from lowvram.data.tokens import Example, template_name
from lowvram.data.work_force import Progress
from lowvram.engine.batch import Batch, collate, collate_packed, collate_pairs
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, DataError
from lowvram.planner.plan import Plan


@dataclass(frozen=True)
class PreparedData:
    """Tokenised training and held-out examples, and their statistics."""

    train: Examples
    held_out: Examples
    stats: DataStats

    def skipped(self, at_most: int | None = None) -> Iterator[str]:
        """`FILE:LINE: reason` of each row that was left out."""
        stores = [self.train.store]
        if self.held_out.store is not self.train.store:
            stores.append(self.held_out.store)
        return itertools.islice((row for store in stores for row in store.problems()), at_most)


def prepare(
    name: str,
    source: ModelSource,
    held_out_share: float = 0.05,
    reading: Reading = Reading(),  # noqa: B008  # frozen
    progress: Progress = lambda _done, _left: None,
    eval_name: str | None = None,
) -> PreparedData:
    """Read, check, tokenise and split; what was prepared before is only looked up.

    Args:
        eval_name: a source of held-out examples, read as `name` is; then all of `name` is trained on.

    Raises:
        DataError: names the file and line.
    """
    pairs = bool(source.config.is_encoder_decoder)
    store = prepare_rows(name, reading, source.tokenizer, progress, pairs=pairs)
    if eval_name is None:
        train, held_out = split_store(store, held_out_share)
    else:
        alike = _reading_of_eval(eval_name, reading, store)
        other = prepare_rows(eval_name, alike, source.tokenizer, progress, pairs=pairs)
        train, held_out = (_all_of(rows) for rows in (store, other))
    return PreparedData(
        train, held_out, data_stats(train, held_out, reading, template_name(source.tokenizer))
    )


def _all_of(store: RowStore) -> Examples:
    bad = store.first_bad()
    if bad and not len(store):
        raise bad
    return store.select(range(len(store)))


def _reading_of_eval(name: str, reading: Reading, store: RowStore) -> Reading:
    """As the training data, by the shape that was found there; a single file has no splits."""
    split = None if Path(name).is_file() else reading.split
    return reading.model_copy(update={"shape": store.entry.known.shape, "split": split})


@dataclass(frozen=True)
class TrainingData:
    """Micro-batches, or packed rows, in the plan's order."""

    plan: Plan
    train: Examples
    held_out: Examples
    pad_token_id: int
    start_token_id: int | None = None  # what an encoder-decoder's decoder reads first

    def steps_of_epoch(self, epoch: int) -> list[list[list[int]]]:
        return batches_of_epoch(
            self.train.lengths.tolist(),
            micro_batch=self.plan.micro_batch,
            accumulation=self.plan.accumulation,
            seed=self.plan.seed,
            epoch=epoch,
            packed_tokens=self._row_tokens if self.plan.packing else None,
        )

    @property
    def _row_tokens(self) -> int:
        return self.plan.micro_batch * self.plan.seq_len

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.train), self.plan.micro_batch * self.plan.accumulation)

    def steps_from(self, step: int) -> Iterator[tuple[int, list[list[Example]]]]:
        """(epoch, micro-batches of examples) of every optimizer step after `step`, to the plan's last."""
        for number in range(step, self.plan.total_steps):
            epoch, at = divmod(number, self.steps_per_epoch)
            if at == 0 or number == step:
                order = self.steps_of_epoch(epoch)
            yield epoch, [[self.train[i] for i in micro_batch] for micro_batch in order[at]]

    def first_micro_batches(self, n: int) -> list[list[Example]]:
        """Of the first epoch, in the order in which they will be trained; all where there are fewer."""
        order = (micro_batch for step in self.steps_of_epoch(0) for micro_batch in step)
        return [[self.train[i] for i in micro_batch] for micro_batch in itertools.islice(order, n)]

    def collate(self, examples: list[Example], packed: bool) -> Batch:
        """One micro-batch, or one packed row."""
        if self.start_token_id is not None:
            return collate_pairs(examples, self.pad_token_id, self.start_token_id)
        return collate_packed(examples) if packed else collate(examples, self.pad_token_id)

    def held_out_micro_batches(self) -> Iterator[list[Example]]:
        """Longest first, in the plan's micro-batch size, or the examples of a packed row."""
        lengths = self.held_out.lengths.tolist()
        size = self.plan.micro_batch
        if self.plan.packing:
            batches = pack(range(len(lengths)), lengths, self._row_tokens, size)
        else:
            ordered = sorted(range(len(lengths)), key=lambda index: -lengths[index])
            batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        for batch in batches:
            yield [self.held_out[index] for index in batch]


def training_data(
    plan: Plan, prepared: PreparedData, pad_token_id: int, start_token_id: int | None = None
) -> TrainingData:
    """Cut to the plan's length and refuse data that is not what was planned.

    Raises:
        ConfigError: the content changed since the plan was made.
        DataError: nothing trainable is left after cutting.
    """
    require_planned_data(plan, prepared.stats)
    sides = [side.cut(plan.seq_len, plan.target_len) for side in (prepared.train, prepared.held_out)]
    for side, name in zip(sides, (plan.data, plan.eval_data or plan.data), strict=True):
        if not side:
            raise DataError(
                f"{name}: no trained token is left within {plan.seq_len} tokens.", "Raise --seq-len."
            )
    return TrainingData(plan, sides[0], sides[1], pad_token_id, start_token_id)


def require_planned_data(plan: Plan, stats: DataStats) -> None:
    """Raises: ConfigError, the content changed since the plan was made."""
    hashes = (
        (plan.data, plan.data_sha256, stats.sha256),
        (plan.eval_data, plan.eval_data_sha256, stats.eval_sha256),
    )
    for name, planned, found in hashes:
        if planned != found:
            raise ConfigError(
                f"'{name}' is not the data that this plan was made for: its content hash differs.",
                "Restore the file, or make a new plan with lowvram auto.",
            )
