"""The real SmolLM2-135M-Instruct in a real llama.cpp: the same tokens, the same answers, the same ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.llama_cpp import LlamaCpp
from tests.test_gguf import written
from tests.tiny_gguf import TRICKY

pytestmark = pytest.mark.slow
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colours.",
    "What is 7 times 8?",
    "Translate 'good morning' into Spanish.",
    "Say only the word yes.",
)


def _asked(tokenizer: Any, prompt: str) -> list[int]:
    chat = [{"role": "user", "content": prompt}]
    ids: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    return ids


@pytest.fixture(scope="module")
def engine(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    return LlamaCpp(written(tmp_path_factory.mktemp("gguf"), smollm))


def test_texts_are_cut_alike(smollm: Path, engine: LlamaCpp) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    for text in (*TRICKY, "<|im_start|>user\nhi<|im_end|>\n"):
        assert engine.tokens(text) == tokenizer(text).input_ids, text


def test_greedy_answers_and_their_ends_are_those_of_transformers(smollm: Path, engine: LlamaCpp) -> None:
    """At F16, 32 tokens for six prompts, and to the end for those that end within 64."""
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()
    ended = 0
    for prompt in PROMPTS:
        ids = _asked(tokenizer, prompt)
        with torch.no_grad():
            output = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)
        own = output[0, len(ids) :].tolist()
        answer = engine.goes_on(ids, 64, ignore_eos=False)
        assert answer["tokens"][:32] == own[:32], prompt
        if own[-1] == tokenizer.eos_token_id:
            assert answer["stop_type"] == "eos", prompt
            ended += 1
    assert ended >= 2


def test_the_engine_s_own_chat_renders_the_same(smollm: Path, engine: LlamaCpp) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    chat = [{"role": "user", "content": PROMPTS[0]}]
    own = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert engine.post("/apply-template", {"messages": chat})["prompt"] == own
