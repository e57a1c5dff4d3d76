"""Pairs for encoder-decoders: what the encoder reads and the answer that the decoder learns to write."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowvram.data.conversations import Conversation
from lowvram.data.tokens import Example, render
from lowvram.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_pairs(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """One example per conversation, in order: all but its last turn is the source, that turn the target.

    A single question is read as it stands, under its system text if it has one: FLAN-T5 and its like were
    taught without roles. Earlier answers need roles, so then the chat template is used. Source and target
    end with the tokenizer's end token, as T5 was trained (arXiv 1910.10683); every target token is trained.

        source  What is 2 + 2?</s>        target  4</s>

    Raises:
        DataError: plain text, which has no source, or a target of nothing but the end token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no end token, so nothing would teach the model to stop.", _OTHER)
    sources = _ids([_source(conversation, tokenizer) for conversation in conversations], tokenizer)
    targets = _ids([conversation.messages[-1].content for conversation in conversations], tokenizer)
    rows = zip(conversations, sources, targets, strict=True)
    return [_example(conversation.where, source, target, eos) for conversation, source, target in rows]


_OTHER = "Use a model such as google/flan-t5-base."


def _source(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    if conversation.text is not None:
        raise DataError(
            f"{conversation.where}: plain text has no question for the encoder to read.",
            "Give rows with a question and an answer, or use a decoder-only model.",
        )
    before = conversation.messages[:-1]
    roles = [message.role for message in before]
    if not tokenizer.chat_template and not conversation.tools and roles in (["user"], ["system", "user"]):
        return "\n\n".join(message.content for message in before)
    return render(conversation, len(before), tokenizer, prompt=True)


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # longer than the model's context is the planner's business
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _example(where: str, source: list[int], target: list[int], eos: int) -> Example:
    if not target:
        raise DataError(f"{where}: nothing but the end token would be trained.", "Remove the row.")
    wanted = _ended(target, eos)
    return Example(
        array("i", wanted), b"\x01" * len(wanted), where, source_ids=array("i", _ended(source, eos))
    )


def _ended(ids: list[int], eos: int) -> list[int]:
    return ids if ids[-1:] == [eos] else [*ids, eos]
