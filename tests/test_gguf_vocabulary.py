"""A tokenizer in a GGUF: a real llama.cpp cuts texts as transformers does, and stops where the model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lowvram.errors import ConfigError
from lowvram.export.gguf_vocabulary import vocabulary
from tests.llama_cpp import LlamaCpp
from tests.test_gguf import written
from tests.tiny_gguf import CUTS, N_SPARE, SENTENCEPIECE, TRICKY, byte_level, saved_model, sentencepiece_like

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two  spaces\n\nand 12345 🙂?"},
    {"role": "assistant", "content": "Yes: 你好."},
    {"role": "user", "content": "Why <think>?"},
]


def _engine(folder: Path, tokenizer: Any) -> LlamaCpp:
    return LlamaCpp(written(folder, saved_model(folder / "base", "llama", tokenizer)))


@pytest.mark.parametrize("pre", list(CUTS))
def test_byte_level_texts_are_cut_alike(tmp_path: Path, pre: str) -> None:
    tokenizer = byte_level(pre, bos=pre == "llama-bpe")
    engine = _engine(tmp_path, tokenizer)
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    for text in (*TRICKY, chat, "<|im_start|> <|im_end|>x<think>y"):
        own = tokenizer(text, add_special_tokens=False).input_ids
        assert engine.tokens(text, whole=False) == own, text
        assert len(set(own)) > 1 or len(text) <= 2
    if pre != "llama-bpe":  # its chats start without the token that the tokenizer adds
        assert engine.tokens("Hello") == tokenizer("Hello").input_ids


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_texts_are_cut_alike(tmp_path: Path, kind: str) -> None:
    """With the space before a text that llama.cpp has a flag for; "first" is right in chats."""
    tokenizer = sentencepiece_like(kind)
    engine = _engine(tmp_path, tokenizer)
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    texts = (chat,) if kind == "first" else (*TRICKY, chat)
    for text in texts:
        assert engine.tokens(text, whole=False) == tokenizer(text, add_special_tokens=False).input_ids, text
    if kind != "first":
        assert engine.tokens("Hello") == tokenizer("Hello").input_ids
        assert engine.tokens("Hello")[0] == tokenizer.bos_token_id


def test_the_kinds_of_tokens() -> None:
    """Control tokens, those that a user's text may spell, bytes, and rows without a token."""
    tokenizer = sentencepiece_like("plain")
    tokenizer.add_tokens(["<think>"])
    made = vocabulary(tokenizer, len(tokenizer) + N_SPARE)
    kinds = dict(zip(made.tokens, made.types, strict=True))
    assert kinds["<s>"] == kinds["</s>"] == TokenType.CONTROL
    assert kinds["<unk>"] == TokenType.UNKNOWN
    assert kinds["<0x0A>"] == TokenType.BYTE
    assert kinds["<think>"] == TokenType.USER_DEFINED
    assert kinds["▁the"] == TokenType.NORMAL
    assert list(made.types[-N_SPARE:]) == [TokenType.UNUSED] * N_SPARE
    assert made.tokens[tokenizer.convert_tokens_to_ids("▁the")] == "▁the"


def _always(base: Path, folder: Path, token: int, ids: list[int]) -> LlamaCpp:
    """llama.cpp with a head that finds `token` the likeliest behind `ids`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[token] = hidden / hidden.norm()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return LlamaCpp(written(folder, folder, "f32"))


@pytest.mark.parametrize(("text", "stops"), [("</s>", True), ("<end_of_turn>", True), ("a", False)])
def test_stops_where_the_model_does(tmp_path: Path, text: str, stops: bool) -> None:
    """At the tokenizer's end token and at that of the template's turns."""
    tokenizer = sentencepiece_like("plain", template="gemma")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    base = saved_model(tmp_path / "base", "llama", tokenizer)
    ids = tokenizer.apply_chat_template(CHAT[1:], add_generation_prompt=True, return_dict=True)["input_ids"]
    engine = _always(base, tmp_path / "changed", tokenizer.convert_tokens_to_ids(text), ids)
    answer = engine.goes_on(ids, 1, ignore_eos=False)
    assert answer["stop_type"] == ("eos" if stops else "limit")


def test_chat_template_and_ids(tmp_path: Path) -> None:
    """transformers' marks of what is trained are gone: llama.cpp would not read the template."""
    tokenizer = sentencepiece_like("plain", template="gemma")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    file = written(tmp_path, saved_model(tmp_path / "base", "gemma", tokenizer))
    fields = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    assert "generation -%}" not in fields["tokenizer.chat_template"]
    assert fields["tokenizer.ggml.eot_token_id"] == tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is True
    asked = {"messages": CHAT[1:]}
    rendered = LlamaCpp(file).post("/apply-template", asked)["prompt"]
    own = tokenizer.apply_chat_template(CHAT[1:], tokenize=False, add_generation_prompt=True)
    assert rendered == own or "<s>" + rendered == own


def test_no_start_token_where_the_template_writes_none() -> None:
    tokenizer = byte_level("llama-bpe", bos=True)
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    made = vocabulary(tokenizer, len(tokenizer))
    assert made.flags["add_bos_token"] is False
    assert "no start token" in made.notes[0]
    tokenizer.chat_template = None
    assert vocabulary(tokenizer, len(tokenizer)).flags["add_bos_token"] is True


def test_unknown_cuts_are_refused() -> None:
    tokenizer = byte_level("gpt-2")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"] = {"type": "Whitespace"}
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>"
    )
    with pytest.raises(ConfigError, match="none of gpt-2, llama-bpe"):
        vocabulary(other, 1000)


def test_other_kinds_and_too_many_tokens_are_refused() -> None:
    tokenizer = byte_level("gpt-2")
    with pytest.raises(ConfigError, match="ids up to 503, the embedding 100 rows"):
        vocabulary(tokenizer, 100)
    words = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    with pytest.raises(ConfigError, match="type WordLevel"):
        vocabulary(wrapped, 100)
