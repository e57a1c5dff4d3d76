"""The text on which a merged model is compared with its adapter: held-out rows, a file, or a bundled text."""

from __future__ import annotations

from array import array
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lowvram.data.row_store import Examples
from lowvram.data.shapes import Reading
from lowvram.data.stats import DataStats
from lowvram.data.tokens import Example
from lowvram.engine.batch import Batch, collate, collate_pairs, start_token
from lowvram.engine.shape import context_limit
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, DataError
from lowvram.export.model_card import named
from lowvram.planner.plan import Plan
from lowvram.training.data import prepare

AT_MOST_TOKENS = 2048  # padding included: a pass of a 135M model on one CPU core takes 20 s
_NOT_THE_BASE_S = "The base's folder has another model's tokenizer: restore it, or merge with --no-verify."
_TEXT = (
    "The first snow fell in the night, and in the morning the whole valley was silent. At the mill the wheel "
    "stood still; the miller's two sons cleared the path to the road, 40 metres in an hour. \"Seventeen "
    'degrees below zero," said the elder, "and the post has not come." They ate bread and cheese, read the '
    "old newspaper once more, and waited. def area(width, height): return width * height"
)


@dataclass(frozen=True)
class Rows:
    """One micro-batch, and what it is, in words."""

    batch: Batch
    what: str
    why: str = ""  # they are not the run's, which may name a folder of this machine


def rows_to_compare(source: ModelSource, plan: Plan | None, data: str | None) -> Rows:
    """Rows of `data`; else of the plan's held-out ones, if they still are those; else a bundled text.

    Raises:
        DataError: `data` holds no row that can be used.
        ConfigError: its rows have tokens that the model does not know.
    """
    if data is not None:
        rows = _first_rows(source, _read(data, source, plan), plan, named(data))
        if unknown := _unknown_token(source, rows.batch):
            raise ConfigError(f"{named(data)}: {unknown}.", _NOT_THE_BASE_S)
        return rows
    if plan is None or plan.data is None:
        return _bundled(source, "no data is given (--data FILE)")
    try:
        prepared = prepare(plan.data, source, plan.held_out_share, plan.reading, eval_name=plan.eval_data)
    except (DataError, ConfigError) as error:
        return _bundled(source, f"the run's data cannot be read ({error.message})")
    if not _is_the_run_s(prepared.stats, plan):
        changed = plan.eval_data or plan.data
        return _bundled(source, f"'{changed}' has changed since the run, so its rows may be trained ones")
    rows = _first_rows(source, prepared.held_out, plan, "held-out")
    if unknown := _unknown_token(source, rows.batch):
        return _bundled(source, f"the run's data cannot be used: {unknown}")
    return rows


def _read(data: str, source: ModelSource, plan: Plan | None) -> Examples:
    """As the run's data was read, if that was said and fits; else by the shape of its rows."""
    mapped = plan is not None and plan.reading != Reading()
    if plan is not None and mapped:
        with suppress(DataError, ConfigError):
            return _all_rows(data, source, plan.reading)
    try:
        return _all_rows(data, source, Reading())
    except DataError as error:
        if "--" not in error.remedy:
            raise
        # It names flags of planning, which merge does not have.
        alike = "Name its fields as those of the run's data, or see" if mapped else "See"
        raise DataError(error.message, f"{alike} how it is read: lowvram data check {data}") from error


def _all_rows(data: str, source: ModelSource, reading: Reading) -> Examples:
    if Path(data).exists():
        reading = reading.model_copy(update={"split": None})  # which named a part of the run's data
    return prepare(data, source, reading=reading, eval_name=data).held_out


def _is_the_run_s(stats: DataStats, plan: Plan) -> bool:
    """Whether what was held out of the training is still that."""
    if plan.eval_data is not None:
        return stats.eval_sha256 == plan.eval_data_sha256
    return stats.sha256 == plan.data_sha256


def _unknown_token(source: ModelSource, batch: Batch) -> str:
    """Says which token has no row in the model's embedding; "" where all have one."""
    vocabulary = _vocabulary(source)
    ids = [batch.input_ids, batch.targets, *([] if batch.source_ids is None else [batch.source_ids])]
    largest = max(int(tokens.max()) for tokens in ids)
    said = f"the tokenizer makes token {largest:,} of its rows, and the model knows {vocabulary:,}"
    return said if largest >= vocabulary else ""


def _vocabulary(source: ModelSource) -> int:
    return int(source.config.get_text_config().vocab_size)


def _first_rows(source: ModelSource, examples: Examples, plan: Plan | None, name: str) -> Rows:
    """As many as fit `AT_MOST_TOKENS` together with their padding, in one micro-batch."""
    longest = min(AT_MOST_TOKENS, context_limit(source.config))
    seq_len = min(plan.seq_len, longest) if plan else longest
    cut = examples.cut(seq_len, min(plan.target_len or longest, longest) if plan else longest)
    chosen: list[Example] = []
    width = 0
    for example in cut:
        width = max(width, example.n_tokens)
        if chosen and width * (len(chosen) + 1) > AT_MOST_TOKENS:
            break
        chosen.append(example)
    if not chosen:
        raise DataError(f"{name}: no trained token is left within {seq_len} tokens.", "Give other --data.")
    batch = _collated(source, chosen)
    what = f"{len(chosen)} of {len(cut)} {name} rows ({batch.trained_tokens:,} trained tokens)"
    return Rows(batch, what)


def _collated(source: ModelSource, examples: list[Example]) -> Batch:
    tokenizer = source.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    pad = pad if pad < _vocabulary(source) else 0  # one that was added to the tokenizer alone; none is read
    if source.config.is_encoder_decoder:
        return collate_pairs(examples, pad, start_token(source.config))
    return collate(examples, pad)


def _bundled(source: ModelSource, why: str) -> Rows:
    ids = _tokenized(source)[: context_limit(source.config)]
    vocabulary = _vocabulary(source)
    what = f"a bundled text of {len(ids)} tokens"
    if len(ids) < 16 or max(ids) >= vocabulary:
        lacks = "tokenizer is another model's" if len(ids) >= 16 else "base has no tokenizer"
        ids = array("q", [7919 * at % vocabulary for at in range(64)])[: context_limit(source.config)]
        what, why = f"{len(ids)} fixed token numbers", f"{why} and the {lacks}"
    pairs = source.config.is_encoder_decoder
    example = Example(ids, bytes([1] * len(ids)), "bundled text", source_ids=ids if pairs else None)
    batch = collate_pairs([example], 0, start_token(source.config)) if pairs else collate([example], 0)
    return Rows(batch, what, why)


def _tokenized(source: ModelSource) -> array[int]:
    """Nothing, or one token of the empty tokenizer that transformers makes then, where there is none."""
    try:
        return array("q", source.tokenizer(_TEXT).input_ids)
    except ConfigError:
        return array("q")
