"""Spelling: rendered text as token ids, with control tokens only where the template wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lowvram.data.control import controls_of
from lowvram.data.turns import Rendered
from lowvram.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

_ANCHOR = "\ue000anchor\ue000"  # an added token of ours: what follows it is spelled as behind a control token
_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[int | None, ...], Speller]]
_KNOWN = WeakKeyDictionary()

Spelled = tuple[list[int], bytearray]  # ids, and 1 for each that is trained


class Speller:
    """Of one tokenizer. A row costs one call of it, unless its text looks like control tokens.

    A turn's first token must not have begun in the prompt, for the model is given the prompt's own tokens.
    Where one would (an answer that begins with a new line, behind the template's new line), the text is cut
    there and the parts are spelled by themselves; so is text that looks like a control token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.controls = controls_of(tokenizer)
        self._state = json.loads(tokenizer.backend_tokenizer.to_str())
        self._whole = _made({**self._state, "truncation": None, "padding": None})

    @cached_property
    def _text_only(self) -> Tokenizer:
        """Knows no control tokens."""
        from tokenizers import AddedToken

        made = _made({**self._state, "truncation": None, "padding": None})
        made.add_tokens([AddedToken(_ANCHOR, special=False, normalized=False)])
        made.encode_special_tokens = True
        return made

    @cached_property
    def _behind_text(self) -> Tokenizer:
        """Knows no control tokens, and puts no space before the first word."""
        made = _made(_without_prefix({**self._state, "truncation": None, "padding": None}))
        made.encode_special_tokens = True
        return made

    def spell(self, rendered: Sequence[Rendered], where: Sequence[str]) -> list[Spelled]:
        """Ids up to the last trained token, for what follows it teaches nothing to a causal model.

        Raises:
            DataError: text that cannot be spelled otherwise than as a control token.
        """
        whole = self._whole.encode_batch([r.text for r in rendered], add_special_tokens=False)
        stops = self.controls.stops
        rows = zip(rendered, whole, where, strict=True)
        return [
            (None if r.escaped else _masked(e, r, stops)) or self._in_parts(r, place) for r, e, place in rows
        ]

    def _in_parts(self, rendered: Rendered, where: str) -> Spelled:
        ids: list[int] = []
        trained = bytearray()
        places = [0, *(place for span in rendered.spans for place in span)]
        behind = ""  # what stands before the next part: nothing, "text" or "control"
        swallowed = False  # whether that is a control token that takes the white space to its right
        for number, (first, end) in enumerate(pairwise(places)):
            is_trained = number % 2 == 1
            for part, control in self._parts(rendered.text[first:end], swallowed and not is_trained):
                if control is not None:
                    found, behind = [control], "control"
                    swallowed = part in self.controls.swallowing[1]
                elif part:
                    found = self._plain(self.controls.unescape(part, rendered.escaped), behind, where)
                    behind, swallowed = "text", False
                else:
                    continue
                ids += found
                trained += bytes([is_trained]) * len(found)
        return ids, trained

    def _parts(self, text: str, swallowed: bool) -> Iterator[tuple[str, int | None]]:
        """Text between control tokens (None), and these with their ids."""
        at = 0
        left, right = self.controls.swallowing
        for match in [*self.controls.pattern.finditer(text), None]:
            before = text[at : match.start() if match else len(text)]
            before = before.lstrip() if swallowed else before
            yield (before.rstrip() if match and match[0] in left else before), None
            if match:
                yield match[0], self.controls.ids[match[0]]
                at, swallowed = match.end(), match[0] in right

    def _plain(self, text: str, behind: str, where: str) -> list[int]:
        if not text:
            return []
        if behind == "text":
            ids = self._behind_text.encode(text, add_special_tokens=False).ids
        elif behind == "control":
            ids = self._text_only.encode(_ANCHOR + text, add_special_tokens=False).ids[1:]
        else:
            ids = self._text_only.encode(text, add_special_tokens=False).ids
        if not self.controls.stops.isdisjoint(ids):
            raise DataError(
                f"{where}: the row holds a control token as text, which this tokenizer cannot write as text.",
                f"Remove it from the row. Control tokens are: {', '.join(list(self.controls.ids)[:5])} ...",
            )
        return list(ids)


def require_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: DataError, if the tokenizer has no offsets."""
    if not tokenizer.is_fast:
        raise DataError("the tokenizer cannot map tokens to text.", "Use a model with a tokenizer.json.")


def speller(tokenizer: PreTrainedTokenizerBase) -> Speller:
    """Made once for a tokenizer and its special tokens: of 256,000 words in a second.

    Raises:
        DataError: as `require_fast`.
    """
    require_fast(tokenizer)
    special = (len(tokenizer), *tokenizer.all_special_ids, tokenizer.bos_token_id, tokenizer.eos_token_id)
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != special:
        known = _KNOWN[tokenizer] = special, Speller(tokenizer)
    return known[1]


def _masked(encoding: Encoding, rendered: Rendered, stops: frozenset[int]) -> Spelled | None:
    """None if a token lies across the beginning or the end of a span."""
    ids = encoding.ids
    trained = bytearray(len(ids))
    end: int | None = 0
    for start, behind in rendered.spans:
        first = _token_at(encoding, start, len(rendered.text))
        end = _token_at(encoding, behind, len(rendered.text))
        last = encoding.char_to_token(behind - 1)
        if end is None and last is not None and ids[last] in stops:  # which may swallow white space
            end = last + 1
        if first is None or end is None:
            return None
        trained[first:end] = b"\x01" * (end - first)
    return ids[:end], trained[:end]


def _token_at(encoding: Encoding, place: int, n_characters: int) -> int | None:
    """The token that begins at this character or, if none has it, at the next; None within a token."""
    while place < n_characters:
        token = encoding.char_to_token(place)
        if token is not None:
            characters = encoding.token_to_chars(token)
            return token if characters is not None and characters[0] >= place else None
        place += 1
    return len(encoding)


def _made(state: dict[str, Any]) -> Tokenizer:
    """Whose tokens' places in the text include the spaces."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(_changed(state, {"trim_offsets": False})))


def _without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    changed = _changed(state, {"prepend_scheme": "never", "add_prefix_space": False})
    changed["normalizer"] = _without_prepend(changed["normalizer"])
    return changed


def _without_prepend(normalizer: Any) -> Any:
    if not isinstance(normalizer, dict) or normalizer["type"] == "Prepend":
        return None
    if normalizer["type"] != "Sequence":
        return normalizer
    kept = [_without_prepend(part) for part in normalizer["normalizers"]]
    return {**normalizer, "normalizers": [part for part in kept if part is not None]}


def _changed(state: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With these settings wherever its parts have them."""

    def within(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: changes.get(name, within(item)) for name, item in value.items()}
        return [within(item) for item in value] if isinstance(value, list) else value

    parts = ("normalizer", "pre_tokenizer", "post_processor")
    return {**state, **{part: within(state[part]) for part in parts}}
