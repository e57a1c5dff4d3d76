"""The text on which a merged model is compared with its adapter: held-out rows, a file, or a bundled text."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from lowvram.data.row_store import Examples
from lowvram.data.tokens import Example
from lowvram.engine.batch import Batch, collate, collate_pairs, start_token
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, DataError
from lowvram.export.model_card import named
from lowvram.planner.plan import Plan
from lowvram.training.data import prepare

AT_MOST_TOKENS = 2048  # padding included: a pass of a 135M model on one CPU core takes 20 s
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
    """Rows of `data`; else of the plan's held-out ones; else a bundled text.

    Raises:
        DataError: `data` holds no row that can be used.
    """
    if data is not None:
        return _first_rows(source, prepare(data, source, eval_name=data).held_out, plan, named(data))
    if plan is None or plan.data is None:
        return _bundled(source, "no data is given (--data FILE)")
    try:
        prepared = prepare(plan.data, source, plan.held_out_share, plan.reading, eval_name=plan.eval_data)
    except (DataError, ConfigError) as error:
        return _bundled(source, f"the run's data cannot be read ({error.message})")
    return _first_rows(source, prepared.held_out, plan, "held-out")


def _first_rows(source: ModelSource, examples: Examples, plan: Plan | None, name: str) -> Rows:
    """As many as fit `AT_MOST_TOKENS` together with their padding, in one micro-batch."""
    seq_len = min(plan.seq_len, AT_MOST_TOKENS) if plan else AT_MOST_TOKENS
    cut = examples.cut(seq_len, plan.target_len if plan else AT_MOST_TOKENS)
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
    if source.config.is_encoder_decoder:
        return collate_pairs(examples, pad, start_token(source.config))
    return collate(examples, pad)


def _bundled(source: ModelSource, why: str) -> Rows:
    ids = _tokenized(source)
    what = f"a bundled text of {len(ids)} tokens"
    if len(ids) < 16:
        vocabulary = source.config.get_text_config().vocab_size
        ids = array("q", [7919 * at % vocabulary for at in range(64)])
        what, why = f"{len(ids)} fixed token numbers", f"{why} and the base has no tokenizer"
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
