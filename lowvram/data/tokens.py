"""Tokens: each conversation as token ids with an exact mask of what is trained."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowvram.data.conversations import Conversation
from lowvram.data.spelling import speller
from lowvram.data.turns import Rendered, render
from lowvram.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 256  # conversations tokenised in one call: enough for the tokenizer's threads, little memory


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and, for each, whether the loss counts it; the last token is always a trained stop token."""

    input_ids: array[int]
    trained: bytes  # 0 or 1 for each token; the first is 0, for nothing predicts it
    where: str
    skipped_turns: int = 0  # earlier assistant turns that the template rewrites, so left untrained
    source_ids: array[int] | None = None  # what an encoder reads; then input_ids is the target, all trained

    def __len__(self) -> int:
        """Tokens that a sequence length limits."""
        return len(self.input_ids if self.source_ids is None else self.source_ids)

    @property
    def n_tokens(self) -> int:
        """All tokens that the model reads, source and target."""
        return len(self.input_ids) + len(self.source_ids or ())

    def tokens(self) -> Iterator[tuple[int, bool]]:
        """Every token with whether it is trained, a pair's source before its target."""
        yield from ((token, False) for token in self.source_ids or ())
        yield from zip(self.input_ids, map(bool, self.trained), strict=True)

    @property
    def n_trained(self) -> int:
        """Number of tokens that the loss counts."""
        return sum(self.trained)


def template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Whose chat template is used: "the model's own" or "lowvram default"."""
    return "the model's own" if tokenizer.chat_template else "lowvram default"


def tokenize(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """One example per conversation, in order; loss on assistant turns and their end-of-turn token only.

    A turn begins where the rendering of the turns before it, with the generation prompt, ends: exactly what
    the model is given when it has to write that turn. With ChatML, trained tokens in brackets:

        <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n[hello<|im_end|>]

    A turn is left out (`skipped_turns`) if its template shows it differently once more turns follow, as
    Qwen3 does by removing old thoughts; one of weight 0 is shown and not trained. What a row says is text,
    also where it reads like a control token (data/control.py). Plain text is trained whole.
    `progress(done, total)` counts conversations.

    Raises:
        DataError: the template refuses or hides a conversation or its tools, nothing in it would be trained,
            or the tokenizer has no offsets or no end-of-text token.
    """
    examples: list[Example] = []
    for first in range(0, len(conversations), _BATCH):
        examples += _tokenize_batch(conversations[first : first + _BATCH], tokenizer)
        if progress:
            progress(len(examples), len(conversations))
    return examples


def cut(example: Example, seq_len: int, target_len: int | None = None) -> Example | None:
    """The first `seq_len` tokens; None when none of them is trained.

    Of a pair the first `seq_len` of its source and `target_len` of its target.
    """
    if example.source_ids is not None:
        target, trained = example.input_ids[:target_len], example.trained[:target_len]
        return Example(target, trained, example.where, source_ids=example.source_ids[:seq_len])
    if len(example) <= seq_len:
        return example
    trained = example.trained[:seq_len]
    if not any(trained):
        return None
    return Example(example.input_ids[:seq_len], trained, example.where, example.skipped_turns)


def _tokenize_batch(batch: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    spell = speller(tokenizer)
    rendered = [render(conversation, tokenizer, spell.controls) for conversation in batch]
    spelled = spell.spell(rendered, [conversation.where for conversation in batch])
    bos = _added_bos(tokenizer)
    rows = zip(batch, rendered, spelled, strict=True)
    return [_example(c, r, ids, trained, tokenizer.eos_token_id, bos) for c, r, (ids, trained) in rows]


def _added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token of the beginning, only if the tokenizer puts one before plain text by itself."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else None


def _example(
    conversation: Conversation,
    rendered: Rendered,
    ids: list[int],
    trained: bytearray,
    eos: int | None,
    bos: int | None,
) -> Example:
    if not rendered.stopped:
        ids, trained = [*ids, _eos(conversation.where, eos)], trained + b"\x01"
    if sum(trained) < 2:
        raise DataError(
            f"{conversation.where}: nothing but the stop token would be trained.",
            "Remove the row, or use a model whose chat template shows its answer.",
        )
    if conversation.text is not None and bos is not None and ids[:1] != [bos]:
        ids, trained = [bos, *ids], bytearray(1) + trained
    trained[0] = 0
    return Example(array("i", ids), bytes(trained), conversation.where, rendered.skipped_turns)


def _eos(where: str, eos: int | None) -> int:
    if eos is None:
        raise DataError(
            f"{where}: nothing would teach the model to stop: neither the chat template nor the tokenizer "
            "has an end token.",
            "Use a model whose tokenizer_config.json names an eos_token.",
        )
    return eos
