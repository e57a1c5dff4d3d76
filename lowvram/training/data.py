"""TrainingData: the plan's data as tokenised examples, split, cut and checked against the plan."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from lowvram.data.conversations import load_conversations
from lowvram.data.order import batches_of_epoch, steps_per_epoch
from lowvram.data.packed_order import pack
from lowvram.data.split import split_held_out
from lowvram.data.stats import DataStats, data_stats
from lowvram.data.tokens import Example, cut, template_name, tokenize
from lowvram.engine.batch import Batch, collate, collate_packed
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, DataError
from lowvram.planner.plan import Plan


@dataclass(frozen=True)
class PreparedData:
    """Tokenised training and held-out examples, and their statistics."""

    train: list[Example]
    held_out: list[Example]
    stats: DataStats


def prepare(name: str, source: ModelSource, held_out_share: float = 0.05) -> PreparedData:
    """Read, check, split and tokenise.

    Raises:
        DataError: names the file and line.
    """
    data = load_conversations(name)
    train_rows, held_out_rows = split_held_out(data.conversations, held_out_share)
    tokenizer = source.tokenizer
    examples = tokenize(data.conversations, tokenizer)
    train, held_out = [examples[i] for i in train_rows], [examples[i] for i in held_out_rows]
    return PreparedData(train, held_out, data_stats(data, train, held_out, template_name(tokenizer)))


@dataclass(frozen=True)
class TrainingData:
    """Micro-batches, or packed rows, in the plan's order."""

    plan: Plan
    train: list[Example]
    held_out: list[Example]
    pad_token_id: int

    def steps_of_epoch(self, epoch: int) -> list[list[list[int]]]:
        return batches_of_epoch(
            [len(e.input_ids) for e in self.train],
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

    def collate(self, examples: list[Example]) -> Batch:
        return collate_packed(examples) if self.plan.packing else collate(examples, self.pad_token_id)

    def held_out_batches(self) -> Iterator[Batch]:
        """Longest first, in the plan's micro-batch size, packed or padded."""
        lengths = [len(e.input_ids) for e in self.held_out]
        size = self.plan.micro_batch
        if self.plan.packing:
            batches = pack(range(len(lengths)), lengths, self._row_tokens, size)
        else:
            ordered = sorted(range(len(lengths)), key=lambda index: -lengths[index])
            batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        for batch in batches:
            yield self.collate([self.held_out[index] for index in batch])


def training_data(plan: Plan, prepared: PreparedData, pad_token_id: int) -> TrainingData:
    """Cut to the plan's length and refuse data that is not what was planned.

    Raises:
        ConfigError: the content changed since the plan was made.
        DataError: nothing trainable is left after cutting.
    """
    if plan.data_sha256 != prepared.stats.sha256:
        raise ConfigError(
            f"'{plan.data}' is not the data that this plan was made for: its content hash differs.",
            "Restore the file, or make a new plan with lowvram auto.",
        )
    sides = [
        [c for c in (cut(e, plan.seq_len) for e in side) if c is not None]
        for side in (prepared.train, prepared.held_out)
    ]
    if not all(sides):
        raise DataError(
            f"{plan.data}: no trained token is left within {plan.seq_len} tokens.", "Raise --seq-len."
        )
    return TrainingData(plan, sides[0], sides[1], pad_token_id)
