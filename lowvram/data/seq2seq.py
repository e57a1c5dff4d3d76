"""Pairs for encoder-decoders: what the encoder reads and the answer that the decoder learns to write."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowvram.data.conversations import Conversation
from lowvram.data.spelling import Speller, speller
from lowvram.data.template import template_of
from lowvram.data.tokens import Example
from lowvram.data.tool_use import require_shown
from lowvram.data.turns import Rendered
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
    spell, where = speller(tokenizer), [conversation.where for conversation in conversations]
    pairs = [_pair(conversation, tokenizer, spell) for conversation in conversations]
    sources = spell.spell([source for source, _ in pairs], where)
    targets = spell.spell([target for _, target in pairs], where)
    rows = zip(where, sources, targets, strict=True)
    return [_example(place, source, target, eos) for place, (source, _), (target, _) in rows]


_OTHER = "Use a model such as google/flan-t5-base."


def _pair(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, spell: Speller
) -> tuple[Rendered, Rendered]:
    """Source and target; what reads like a control token in them is text (data/control.py)."""
    if conversation.text is not None:
        raise DataError(
            f"{conversation.where}: plain text has no question for the encoder to read.",
            "Give rows with a question and an answer, or use a decoder-only model.",
        )
    if not conversation.messages[-1].content.strip():
        raise DataError(
            f"{conversation.where}: nothing but the end token would be trained.", "Remove the row."
        )
    if conversation.messages[-1].extra.get("tool_calls"):
        raise DataError(
            f"{conversation.where}: the last turn calls a tool, for which a target has no place.",
            "Write the call into its text, remove the row, or use a decoder-only model.",
        )
    shown, escaped = spell.controls.escape(conversation)
    texts = _source(shown, tokenizer), shown.messages[-1].content
    source, target = (Rendered(text, ((0, len(text)),), False, escaped) for text in texts)
    return source, target


def _source(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    before = conversation.messages[:-1]
    if not before:
        raise DataError(
            f"{conversation.where}: nothing comes before the answer, so the encoder has nothing to read.",
            "Put a question before it, or use a decoder-only model.",
        )
    roles = [message.role for message in before]
    if not tokenizer.chat_template and not conversation.tools and roles in (["user"], ["system", "user"]):
        return "\n\n".join(message.content for message in before)
    template = template_of(conversation, tokenizer)
    if template.tools or any(message.get("tool_calls") for message in template.messages):
        require_shown(template)  # any other row is asked for its source alone
    return template.text(template.messages[:-1], prompt=True)


def _example(where: str, source: list[int], target: list[int], eos: int) -> Example:
    wanted = array("i", _ended(target, eos))
    return Example(wanted, b"\x01" * len(wanted), where, source_ids=array("i", _ended(source, eos)))


def _ended(ids: list[int], eos: int) -> list[int]:
    return ids if ids[-1:] == [eos] else [*ids, eos]
