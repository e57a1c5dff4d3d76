"""Tiny random models of the families that a GGUF can hold, with tokenizers of their kinds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from tests.chat_families import TEMPLATES

N_SPARE = 5  # rows of the embedding without a token
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
_GEMMA: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SHAPE, rope_parameters=_LLAMA3),
    "llama with biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, tie_word_embeddings=True),
    "llama of linear positions": lambda: LlamaConfig(**SHAPE, rope_parameters=_LINEAR),
    "mistral": lambda: MistralConfig(**SHAPE, head_dim=32, sliding_window=None),
    "smollm3": lambda: SmolLM3Config(**SHAPE | {"num_hidden_layers": 4}, pad_token_id=None),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2 with yarn": lambda: Qwen2Config(**SHAPE, rope_parameters=_YARN),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=32),
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=32),
    "gemma2": lambda: Gemma2Config(**SHAPE, **_GEMMA),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE | {"num_hidden_layers": 6}, **_GEMMA),
}

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _BYTES])


CUTS: dict[str, Any] = {  # llama.cpp's name -> what the makers' tokenizer.json says
    "gpt-2": _WORDS,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _WORDS]),
    "llama-bpe": _split(_LLAMA3_SPLIT),
    "qwen2": _split(_LLAMA3_SPLIT.replace("{1,3}", "")),
    "tekken": _split(_TEKKEN_SPLIT),
}
TRICKY = (
    "Hello world",
    "  two  spaces,   three   and a trailing one ",
    "tab\tand\nnew lines\n\n\nand\r\nmore \n ",
    "12345 3.14159 1,000,000 2024-11-26 7",
    "Ünïcödé naïve café ÀÉÎ straße",
    "你好，世界。日本語とカタカナ 한국어",
    "🙂 👩‍👩‍👧‍👦 🇫🇷 🤷🏽‍♀️",
    "don't WON'T I'll we'Re 'twas",
    "a_b-c/d\\e {x: [1, 2]} <b>&amp;</b> $%^",
    "العربية עברית हिन्दी",
    "\u00a0no-break\u200bzero\ufeffwidth",
    "camelCaseWords HTTPServer iPhone",
    " ",
    "x",
)
SENTENCEPIECE = ("prepend", "first", "plain")


@cache
def _corpus() -> list[str]:
    import lowvram

    answers = (Path(lowvram.__file__).parent / "demo" / "answers.jsonl").read_text(encoding="utf-8")
    return [*answers.splitlines(), *TRICKY, *TRICKY]


def byte_level(pre: str, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 500 tokens that cuts as the one that llama.cpp calls `pre`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = CUTS[pre], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(_corpus(), trainer)
    if pre == "llama-bpe":
        state = json.loads(made.to_str())
        state["model"]["ignore_merges"] = True
        made = Tokenizer.from_str(json.dumps(state))
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return _wrapped(made, "<|endoftext|>", "<|im_end|>", "smollm2", bos)


def sentencepiece_like(
    kind: str, *, bos: bool = True, template: str = "mistral_v1"
) -> PreTrainedTokenizerFast:
    """A BPE with bytes to fall back on, as made of a sentencepiece model: every split of a token is a merge.

    Args:
        kind: a space goes before every text ("prepend"), before the first ("first") or before none ("plain").
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator(_corpus(), trainers.BpeTrainer(vocab_size=600, show_progress=False))
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [*special, *(word for word, _ in learned)]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    splits = [(w[:i], w[i:]) for w, _ in learned for i in range(1, len(w)) if w not in special]
    merges = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    if kind == "first":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        first = [normalizers.Prepend("▁")] if kind == "prepend" else []
        made.normalizer = normalizers.Sequence([*first, replace])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special[:3]])
    return _wrapped(made, "<s>", "</s>", template, bos)


def _wrapped(made: Tokenizer, bos: str, eos: str, template: str, adds_bos: bool) -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    if adds_bos:
        made.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=bos,
        eos_token=eos,
        chat_template=(TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )


def saved_model(
    folder: Path, kind: str, tokenizer: Any = None, *, dtype: torch.dtype = torch.float16, **changes: Any
) -> Path:
    """A model of `CONFIGS` whose numbers all matter: norms far from one, biases far from zero."""
    tokenizer = tokenizer or byte_level("gpt-2")
    config = CONFIGS[kind]()
    config.vocab_size = len(tokenizer) + N_SPARE
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    config.update({**ids, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        one = 0.0 if kind.startswith("gemma") else 1.0
        is_norm = name.endswith("norm.weight")
        parameter.data = (one + 0.3 * noise) if is_norm else (0.1 if parameter.ndim > 1 else 0.5) * noise
    model.generation_config.pad_token_id = None
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
