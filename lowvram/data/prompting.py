"""Prompting: turns that wait for an answer as the ids that training showed, and the tokens that end one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowvram.data.conversations import Conversation, Message
from lowvram.data.spelling import speller
from lowvram.data.template import template_of
from lowvram.data.turns import Rendered, render
from lowvram.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_ids(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, where: str = "the conversation"
) -> list[int]:
    """The turns and the start of the assistant's, spelled as in training.

    The model's own chat template, or lowvram's where it has none. What a turn says is text, also where it
    reads like a control token (data/control.py).

    Raises:
        DataError: the template refuses these turns, or the tokenizer cannot spell them.
    """
    spell = speller(tokenizer)
    conversation = Conversation(messages=tuple(messages), where=where)
    shown, mark = spell.controls.escape(conversation)
    template = template_of(shown, tokenizer)
    text = template.text(template.messages, prompt=True)
    whole = Rendered(text, ((0, len(text)),), stopped=False, escaped=mark)
    ((ids, _),) = spell.spell([whole], [where])
    return ids


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What ends an answer in training: the end-of-turn tokens of the template, and the tokenizer's end.

    A base model's own end token is often another: a Qwen2 that was trained on its chat template ends with
    <|im_end|>, while its generation_config stops at <|endoftext|> only.
    """
    ends = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    spell = speller(tokenizer)
    turns = (Message(role="user", content="a"), Message(role="assistant", content="b"))
    try:
        rendered = render(Conversation(messages=turns, where="a turn"), tokenizer, spell.controls)
    except DataError:  # a template that shows no such turn is refused when it is asked something
        return ends
    ((ids, _),) = spell.spell([rendered], ["a turn"])
    while ids and ids[-1] in spell.controls.stops:
        ends.add(ids.pop())
    return ends
