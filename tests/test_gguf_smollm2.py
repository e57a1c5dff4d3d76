"""The real SmolLM2-135M-Instruct in a real llama.cpp: the same tokens, the same answers, the same ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.llama_cpp import LlamaCpp, assert_agrees
from tests.test_gguf import written
from tests.test_gguf_lora import lora_of
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


def test_an_adapter_merged_and_apart(smollm: Path, tmp_path: Path, engine: LlamaCpp) -> None:
    """The merged F16 file, and the base's with the LoRA-GGUF, find the same tokens as likely as peft."""
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.005)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = LlamaCpp(written(tmp_path, smollm, adapter=tmp_path / "adapter"))
    lora_of(smollm, tmp_path / "adapter").write(tmp_path / "lora.gguf")
    apart = LlamaCpp(written(tmp_path, smollm, "bf16"), tmp_path / "lora.gguf")
    base = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.bfloat16)
    rounded = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().float().eval()
    close: dict[str, Any] = {"tolerance": 0.1, "ends": tuple(tokenizer.all_special_ids)}
    for prompt in PROMPTS[:5]:
        ids = _asked(tokenizer, prompt)
        assert_agrees(rounded, merged, ids, 32, **close)
        assert_agrees(model, apart, ids, 32, **close)
    with pytest.raises(AssertionError):
        assert_agrees(model, engine, ids, 32, **close)


def test_the_engine_s_own_chat_renders_the_same(smollm: Path, engine: LlamaCpp) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    chat = [{"role": "user", "content": PROMPTS[0]}]
    own = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert engine.post("/apply-template", {"messages": chat})["prompt"] == own
