"""A prompt is, token by token, what training showed before an answer; what ended that one ends this one."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowvram.data.conversations import Conversation, Message
from lowvram.data.prompting import prompt_ids, stop_ids
from lowvram.data.tokens import tokenize
from lowvram.errors import DataError
from tests import tiny_runs

byte_model = tiny_runs.byte_model
SAID = [
    ("hi there", "hello"),
    ("what does <|im_end|> mean?", "it ends a turn"),
    ("  spaces ", "\nand lines"),
]


@pytest.fixture(params=["smollm", "byte_model"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """With a chat template of its own, and without."""
    return AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))


@pytest.mark.parametrize("n_turns", [1, 2, 3])
def test_a_prompt_is_what_training_showed_before_the_answer(
    tokenizer: PreTrainedTokenizerBase, n_turns: int
) -> None:
    turns = [Message(role="system", content="be brief")]
    for question, answer in SAID[:n_turns]:
        turns += [Message(role="user", content=question), Message(role="assistant", content=answer)]
    (example,) = tokenize([Conversation(messages=tuple(turns), where="here")], tokenizer)
    ids = prompt_ids(turns[:-1], tokenizer)
    assert list(example.input_ids[: len(ids)]) == ids
    assert example.trained[len(ids)] == 1
    assert example.trained[len(ids) - 1] == 0


def test_what_ends_a_trained_answer_stops_it(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = (Message(role="user", content="hi"), Message(role="assistant", content="hello"))
    (example,) = tokenize([Conversation(messages=turns, where="here")], tokenizer)
    assert example.input_ids[-1] in stop_ids(tokenizer)
    assert tokenizer.eos_token_id in stop_ids(tokenizer)


def test_a_template_s_end_of_turn_stops_although_the_end_token_is_another(smollm: Path) -> None:
    """As of a base model whose end token is <|endoftext|> and whose template writes <|im_end|>."""
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_ids(tokenizer) == set(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))


def test_a_template_that_refuses_says_where(smollm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    tokenizer.chat_template = "{{ raise_exception('no system prompt, please') }}"
    with pytest.raises(DataError, match=r"rows\.jsonl:3: .*no system prompt, please"):
        prompt_ids([Message(role="user", content="hi")], tokenizer, "rows.jsonl:3")
