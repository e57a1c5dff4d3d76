"""llama.cpp's names for the ways in which byte-level tokenizers cut a text before they merge.

llama.cpp has each way built in under a name, so a file must say the right one. It is told by what the
tokenizer does, not by the model's name: by its regular expressions, whether digits stand alone, and whether a
word that is a token is taken whole (`ignore_merges`).
"""

from __future__ import annotations

from typing import Any

from lowvram.errors import ConfigError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTIONS}{_WORD}|\p{{N}}{{1,3}}{_END}"
_QWEN2 = rf"{_CONTRACTIONS}{_WORD}|\p{{N}}{_END}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = "byte-level"  # its expression is built into the tokenizers library's ByteLevel

# Steps, and whether merges are skipped for a whole word -> the name.
_KNOWN: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    (("digits", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_TEKKEN,), False): "tekken",  # its merges make every one of its words
}
OTHER_CONVERTER = "Convert the merged folder with llama.cpp's own script: lowvram merge RUN"


def pretokenizer(state: dict[str, Any]) -> str:
    """llama.cpp's name for the cutting of a byte-level BPE tokenizer.

    Args:
        state: tokenizer.json as an object.

    Raises:
        ConfigError: llama.cpp has none for it that is known here.
    """
    steps = tuple(filter(None, map(_step, flat(state.get("pre_tokenizer")))))
    changes = [step["type"] for step in flat(state.get("normalizer")) if step["type"] != "NFC"]
    if changes:  # composing accents is skipped: llama.cpp takes a text as it is
        raise ConfigError(f"This tokenizer changes the text first: {', '.join(changes)}.", OTHER_CONVERTER)
    key = steps, bool(state["model"].get("ignore_merges"))
    if key not in _KNOWN:
        names = ", ".join(sorted(set(_KNOWN.values())))
        raise ConfigError(
            f"This tokenizer cuts text in a way that is none of {names}: {' then '.join(steps)[:200]}.",
            OTHER_CONVERTER,
        )
    return _KNOWN[key]


def flat(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The single steps of a tokenizer's normalizer or pre-tokenizer."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step.get("pretokenizers") or step["normalizers"] for inner in flat(part)]
    return [step]


def _step(step: dict[str, Any]) -> str:
    """One step as `_KNOWN` spells it; empty where it cuts nothing."""
    if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
        return _GPT2 if step.get("use_regex", True) else ""
    if step["type"] == "Digits" and step.get("individual_digits"):
        return "digits"
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex", step["pattern"]))
    return str({key: value for key, value in step.items() if key != "trim_offsets"})
