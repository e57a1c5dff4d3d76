"""A tokenizer as a GGUF holds it: tokens with their kinds, scores or merges, special ids, chat template."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType

from lowvram.data.control import controls_of
from lowvram.errors import ConfigError
from lowvram.export.gguf_pretokenizers import OTHER_CONVERTER, flat, pretokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"  # U+2581, as SentencePiece writes a space
_UNREACHED = -1e9  # a token that no merge makes: below every rank
_NO_START = "The chat template writes no start token, so the file says not to add one."


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer says of itself, in llama.cpp's terms."""

    model: str  # "gpt2": byte-level BPE; "llama": SentencePiece's BPE with bytes to fall back on
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float]
    merges: list[str]
    flags: dict[str, bool]  # add_bos_token, add_eos_token, add_space_prefix
    ids: dict[str, int]  # bos, eos, eot, unknown, padding
    template: str | None
    notes: list[str] = field(default_factory=list)

    def add_to(self, writer: GGUFWriter) -> None:
        """All its keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, value in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        for name, number in self.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary(tokenizer: Any, n_rows: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer, filled up to the embedding's `n_rows`.

    Raises:
        ConfigError: of a kind that llama.cpp has not, or with more tokens than the embedding has rows.
    """
    if not tokenizer.is_fast:
        raise ConfigError("This tokenizer has no tokenizer.json (a fast tokenizer).", OTHER_CONVERTER)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = _is_sentencepiece(state)
    tokens, types = _tokens(tokenizer, state, n_rows, pieces)
    add_bos, add_eos = _wraps(tokenizer)
    flags = {"add_bos_token": adds_start_token(tokenizer), "add_eos_token": add_eos}
    notes = [] if flags["add_bos_token"] == add_bos else [_NO_START]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
    if pieces:
        flags["add_space_prefix"], more = _space_prefix(state, bool(tokenizer.chat_template))
        notes += more
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        pre="default" if pieces else pretokenizer(state),
        tokens=tokens,
        types=types,
        scores=_scores(tokens, merges) if pieces else [],
        merges=[] if pieces else merges,
        flags=flags,
        ids=_ids(tokenizer),
        template=chat_template(tokenizer),
        notes=notes,
    )


def _tokens(
    tokenizer: Any, state: dict[str, Any], n_rows: int, pieces: bool
) -> tuple[list[str], list[TokenType]]:
    """Text and kind of each id; rows of the embedding without a token are named and unused."""
    known = tokenizer.get_vocab()
    if max(known.values()) >= n_rows:
        raise ConfigError(
            f"The tokenizer has ids up to {max(known.values()):,}, the embedding {n_rows:,} rows.",
            "Take the tokenizer that the model was trained with.",
        )
    tokens, types = [f"[PAD{i}]" for i in range(n_rows)], [TokenType.UNUSED] * n_rows
    for text, number in known.items():
        tokens[number], types[number] = text, TokenType.NORMAL
    _mark_added(state, tokens, types, pieces)
    return tokens, types


def _is_sentencepiece(state: dict[str, Any]) -> bool:
    """Which of the two kinds of BPE.

    Raises:
        ConfigError: neither.
    """
    model = state["model"]
    if model["type"] != "BPE":
        raise ConfigError(
            f"A tokenizer of type {model['type']} cannot be written as GGUF here.", OTHER_CONVERTER
        )
    return bool(model.get("byte_fallback"))


def _mark_added(state: dict[str, Any], tokens: list[str], types: list[TokenType], pieces: bool) -> None:
    """Control tokens must not be spelled by a user's text, nor printed: engines tell them by their type."""
    if pieces:
        for number, text in enumerate(tokens):
            if _BYTE.fullmatch(text):
                types[number] = TokenType.BYTE
    for added in state["added_tokens"]:
        number = added["id"]
        types[number] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if pieces and not added["special"] and added["normalized"]:
            tokens[number] = tokens[number].replace(_SPACE, " ")  # found in the text as it was written
    unknown = state["model"].get("unk_token")
    if pieces and unknown in tokens:
        types[tokens.index(unknown)] = TokenType.UNKNOWN


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """llama.cpp merges first what scores highest: the rank of the first merge that makes a token, negated."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", "", 1), rank)
    return [-float(ranks[t]) if t in ranks else 0.0 if len(t) == 1 else _UNREACHED for t in tokens]


def _wraps(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its start token before a text, and its end token behind it; tried out."""
    plain, whole = (tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
    before = whole[: whole.index(plain[0])] if plain and plain[0] in whole else []
    after = whole[len(before) + len(plain) :]
    return before == [tokenizer.bos_token_id], after == [tokenizer.eos_token_id]


def adds_start_token(tokenizer: Any) -> bool:
    """Whether an engine is to put a start token: llama.cpp drops the template's own and goes by this flag.

    Where the template writes none, none was trained in front of a chat.
    """
    if not _wraps(tokenizer)[0] or not tokenizer.chat_template:
        return _wraps(tokenizer)[0]
    asked = [{"role": "user", "content": "a"}]
    return str(tokenizer.apply_chat_template(asked, tokenize=False)).startswith(tokenizer.bos_token)


def _space_prefix(state: dict[str, Any], chats: bool) -> tuple[bool, list[str]]:
    """Whether a space goes before a text and behind each control token: llama.cpp has one flag for both."""
    steps = [*flat(state.get("normalizer")), *flat(state.get("pre_tokenizer"))]
    odd = [step["type"] for step in steps if step["type"] not in ("Prepend", "Replace", "Metaspace", "Split")]
    if odd:
        raise ConfigError(f"This tokenizer changes the text first: {', '.join(odd)}.", OTHER_CONVERTER)
    schemes = {step.get("prepend_scheme", "always" if step["type"] == "Prepend" else None) for step in steps}
    if "always" in schemes:
        return True, []
    if "first" not in schemes:
        return False, []
    if not chats:
        return True, []
    return False, ["Raw prompts lack the space that this tokenizer puts before them; chats are as trained."]


def _ids(tokenizer: Any) -> dict[str, int]:
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": end_of_turn(tokenizer),
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    if found["eot"] == found["eos"]:
        del found["eot"]
    return {name: number for name, number in found.items() if number is not None}


def end_of_turn(tokenizer: Any) -> int | None:
    """The control token that the chat template writes behind an answer: where a trained model stops."""
    if not tokenizer.chat_template:
        return None
    mark, controls = "lowvram-answer", controls_of(tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    rest = str(tokenizer.apply_chat_template(turns, tokenize=False)).partition(mark)[2]
    found = controls.pattern.match(rest.lstrip())
    return controls.ids[found[0]] if found else None


def chat_template(tokenizer: Any) -> str | None:
    """The template's text; of several by name, the default one.

    transformers' marks around what the assistant writes render to nothing, and llama.cpp does not know them.
    """
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    if not found:
        return None
    opened = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", str(found))
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", opened)
