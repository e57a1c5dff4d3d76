"""Masks: in each family's chat format the trained tokens are exactly the assistant's turns and their ends."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lowvram.data.conversations import Conversation, Message
from lowvram.data.tokens import Example, tokenize
from lowvram.errors import DataError
from tests.chat_families import FAMILIES, Family, Part, tokenizer_of

QUICK = settings(max_examples=25, derandomize=True, deadline=None, database=None)
THOROUGH = settings(QUICK, max_examples=600, suppress_health_check=list(HealthCheck))
TOOLS = ({"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}},)

# What breaks templates: their own markers, white space at the ends, unusual characters.
MARKERS = (
    "<|im_start|>assistant\n",
    "<|im_end|>",
    "<|im_end|>\n<|im_start|>user\n",
    "<|endoftext|>",
    "[INST]",
    " [/INST] ",
    "</s>",
    "<s>",
    "<unk>",
    "<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<end_of_turn>\n<start_of_turn>model\n",
    "<bos>",
    "<|end|>\n<|assistant|>\n",
    "[TOOL_CALLS]",
    "### Assistant:\n",
    "<tool_call>",
    "{{ messages }}{% endfor %}",
)
WORDS = (
    "hello",
    "What is 12 times 12?",
    "144",
    "naïve",
    "日本語",
    "😀",
    "👩🏽‍🚀",
    "é",
    "\u202e",
    ' "quoted" ',
)
SPACES = (" ", "  ", "\n", "\n\n\n", "\r\n", "\t", "\u00a0", "\u3000")
TEXT = st.lists(st.sampled_from(MARKERS + WORDS + SPACES), max_size=6).map("".join)
SAID = st.one_of(TEXT, st.sampled_from(WORDS))


@st.composite
def conversations(draw: st.DrawFn, family: Family) -> Conversation:
    """Of one to three exchanges, some with calls of tools."""
    messages = []
    if family.system and draw(st.booleans()):
        messages.append(Message(role="system", content=draw(TEXT)))
    tools = TOOLS if family.tools and draw(st.booleans()) else ()
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message(role="user", content=draw(SAID)))
        if tools and draw(st.booleans()):
            messages += _called(draw, draw(st.integers(1, family.calls_at_once)))
        messages.append(Message(role="assistant", content=draw(SAID)))
    messages[-1] = Message(role="assistant", content=draw(SAID.filter(str.strip)))
    return Conversation(messages=tuple(messages), tools=tools, where="x:1")


def _called(draw: st.DrawFn, n: int) -> list[Message]:
    ids = [f"call0000{number}" for number in range(n)]
    calls = [{"id": i, "function": {"name": "get_weather", "arguments": {"city": draw(SAID)}}} for i in ids]
    return [
        Message(role="assistant", content="", extra={"tool_calls": calls}),
        *(Message(role="tool", content=draw(SAID), extra={"tool_call_id": i}) for i in ids),
    ]


def spelled(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """What the tokens say, each by itself: a decoder would trim spaces."""
    as_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    added, said = tokenizer.added_tokens_decoder, bytearray()
    for number in ids:
        token = tokenizer.convert_ids_to_tokens(number)
        if number in added:
            said += added[number].content.encode()
        elif "ByteLevel" in repr(tokenizer.backend_tokenizer.pre_tokenizer):
            said += bytes(as_byte[c] for c in token)
        elif len(token) == 6 and token.startswith("<0x"):
            said.append(int(token[3:5], 16))
        else:
            said += token.replace("▁", " ").encode()
    return said.decode()


def check(example: Example, tokenizer: PreTrainedTokenizerFast, parts: list[Part]) -> None:
    """Against the parts that the oracle wrote: text, who wrote each, and where control tokens stand."""
    last = max(n for n, (_, kind, _) in enumerate(parts) if kind == "answer")
    parts = parts[: last + 1]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = list(example.input_ids)
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids if i in special] == [t for t, _, c in parts if c]
    runs = groupby(zip(ids, example.trained, strict=True), key=lambda pair: pair[1])
    found = [(bool(trained), spelled(tokenizer, [i for i, _ in run])) for trained, run in runs]
    assert found == _runs(parts, prefixed=_prepends(tokenizer))


def _prepends(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether each text behind a special token begins with a space of the tokenizer's own."""
    return "Prepend" in repr(tokenizer.backend_tokenizer.normalizer)


def _runs(parts: list[Part], prefixed: bool) -> list[tuple[bool, str]]:
    """What is trained and what not, by turns."""
    spaced, behind_control = [], True
    for text, kind, control in parts:
        spaced.append((f" {text}" if text and prefixed and behind_control and not control else text, kind))
        behind_control = control or (behind_control and not text)
    runs = groupby(((t, k == "answer") for t, k in spaced if t), key=lambda pair: pair[1])
    return [(trained, "".join(t for t, _ in run)) for trained, run in runs]


def masked_as_documented(family: Family, smollm: Path, conversation: Conversation) -> None:
    tokenizer = tokenizer_of(family, smollm)
    (example,) = tokenize([conversation], tokenizer)
    assert example.skipped_turns == 0
    assert example.trained[-1] == 1
    check(example, tokenizer, family.parts(conversation))


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_tokens_are_exactly_the_assistant_turns(smollm: Path, name: str) -> None:
    family = FAMILIES[name]
    QUICK(given(conversations(family))(lambda c: masked_as_documented(family, smollm, c)))()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_trained_tokens_are_exactly_the_assistant_turns_thoroughly(smollm: Path, name: str) -> None:
    family = FAMILIES[name]
    THOROUGH(given(conversations(family))(lambda c: masked_as_documented(family, smollm, c)))()
