"""A tiny real T5 with a tokenizer of its own, and questions that it can learn to answer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

_WORDS = ["red", "blue", "green", "gold", "black", "white", "small", "large", "old", "new"]
_THINGS = ["cat", "dog", "house", "tree", "river", "stone"]


def rows() -> list[dict[str, str]]:
    """Questions whose answer is their own words in another order."""
    return [
        {"question": f"turn round: {word} {thing}", "answer": f"{thing} {word}"}
        for word in _WORDS
        for thing in _THINGS
    ]


def write_rows(file: Path) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return file


def tokenizer() -> PreTrainedTokenizerFast:
    """Sentencepiece's way as T5 has it: a Unigram over ▁words, `</s>` after each text, no chat template."""
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator((text for row in rows() for text in row.values()), trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", inner.token_to_id("</s>"))]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def save_t5(folder: Path) -> Path:
    """Weights, config and tokenizer; a head of its own, as FLAN-T5 has."""
    made = tokenizer()
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(made),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
