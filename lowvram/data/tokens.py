"""Tokens: each conversation as token ids with an exact mask of what is trained."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvram.data.conversations import Conversation, Message
from lowvram.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CHAT_TEMPLATE = (
    "{% if tools %}{{ raise_exception('the default template knows no tools') }}{% endif %}"
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['tool_calls'] %}{{ raise_exception('the default template knows no tools') }}{% endif %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)

_BATCH = 256  # conversations tokenised in one call: enough for the tokenizer's threads, little memory


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and, for each, whether the loss counts it; the last token is always a trained stop token."""

    input_ids: array[int]
    trained: bytes  # 0 or 1 for each token; the first is 0, for nothing predicts it
    where: str
    skipped_turns: int = 0  # earlier assistant turns that the template rewrites, so left untrained
    source_ids: array[int] | None = None  # what an encoder reads; then input_ids is the target, all trained

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_trained(self) -> int:
        """Number of tokens that the loss counts."""
        return sum(self.trained)


@dataclass(frozen=True, slots=True)
class _Rendered:
    """The text the model sees, and the character spans in it that are trained."""

    text: str
    spans: tuple[tuple[int, int], ...]
    skipped_turns: int = 0


@dataclass(frozen=True, slots=True)
class _Rules:
    """What a tokenizer's special tokens mean here."""

    stops: frozenset[int]
    eos: int | None
    added_bos: int | None  # only if the tokenizer puts one before plain text by itself


def template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Whose chat template is used: "the model's own" or "lowvram default"."""
    return "the model's own" if tokenizer.chat_template else "lowvram default"


def tokenize(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """One example per conversation, in order; loss on assistant turns and their end-of-turn token only.

    A turn begins where the rendering of the turns before it, with the generation prompt, ends: exactly what
    the model is given when it has to write that turn. With ChatML, trained tokens in brackets:

        <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n[hello<|im_end|>]

    A turn is left out (`skipped_turns`) if its template shows it differently once more turns follow, as
    Qwen3 does by removing old thoughts. Plain text is trained whole. `progress(done, total)` counts
    conversations.

    Raises:
        DataError: the template refuses or hides a conversation, nothing in it would be trained, or the
            tokenizer has no offsets or no end-of-text token.
    """
    if not tokenizer.is_fast:
        raise DataError("the tokenizer cannot map tokens to text.", "Use a model with a tokenizer.json.")
    rules = _rules(tokenizer)
    examples: list[Example] = []
    for first in range(0, len(conversations), _BATCH):
        batch = conversations[first : first + _BATCH]
        examples += _tokenize_batch(batch, tokenizer, rules)
        if progress:
            progress(len(examples), len(conversations))
    return examples


def cut(example: Example, seq_len: int) -> Example | None:
    """The first `seq_len` tokens; None when none of them is trained."""
    if len(example) <= seq_len:
        return example
    trained = example.trained[:seq_len]
    if not any(trained):
        return None
    return Example(example.input_ids[:seq_len], trained, example.where, example.skipped_turns)


def _tokenize_batch(
    batch: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, rules: _Rules
) -> list[Example]:
    rendered = [_rendered(conversation, tokenizer) for conversation in batch]
    encoded = tokenizer(
        [r.text for r in rendered],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # longer than the model's context is the planner's business
    )
    rows = zip(batch, rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [_example(c, r, ids, offsets, rules) for c, r, ids, offsets in rows]


def _rules(tokenizer: PreTrainedTokenizerBase) -> _Rules:
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    # These end nothing, even at the end of a text, unless one of them is EOS as well.
    special -= {bos, tokenizer.unk_token_id}
    adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    stops = special | ({eos} if eos is not None else set())
    return _Rules(frozenset(stops), eos, bos if adds_bos else None)


def _rendered(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> _Rendered:
    if conversation.text is not None:
        return _Rendered(conversation.text, ((0, len(conversation.text)),))
    messages = conversation.messages
    full = render(conversation, len(messages), tokenizer)
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    spans = [_span(conversation, i, full, tokenizer) for i in turns]
    if not spans or spans[-1] is None or turns[-1] != len(messages) - 1:
        raise DataError(
            f"{conversation.where}: the chat template does not show the last assistant turn as an answer.",
            "Use a model with another chat template, or train on the text shape.",
        )
    found = tuple(span for span in spans if span is not None)
    return _Rendered(full, found, skipped_turns=len(spans) - len(found))


def _span(
    conversation: Conversation, turn: int, full: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int] | None:
    """Characters of assistant turn `turn`; None if `full` shows it, or what precedes it, differently."""
    last = turn == len(conversation.messages) - 1
    try:
        prompt = render(conversation, turn, tokenizer, prompt=True)
        through = full if last else render(conversation, turn + 1, tokenizer)
    except DataError:
        if last:
            raise
        return None  # a template may refuse a conversation that stops, or starts, here
    if full.startswith(through) and through.startswith(prompt):
        return len(prompt), len(through)
    return None


def render(
    conversation: Conversation, turns: int, tokenizer: PreTrainedTokenizerBase, *, prompt: bool = False
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                [_as_dict(message) for message in conversation.messages[:turns]],
                tools=list(conversation.tools) or None,
                chat_template=None if tokenizer.chat_template else DEFAULT_CHAT_TEMPLATE,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        )
    except Exception as error:  # a template is a program of the model's author: it raises what it likes
        raise DataError(
            f"{conversation.where}: the model's chat template refuses this conversation ({error}).",
            "Change the row to turns that this model knows, or use another model.",
        ) from error


def _as_dict(message: Message) -> dict[str, Any]:
    return {**message.extra, "role": message.role, "content": message.content}


def _example(
    conversation: Conversation,
    rendered: _Rendered,
    ids: list[int],
    offsets: list[tuple[int, int]],
    rules: _Rules,
) -> Example:
    ids, trained, stopped = _masked(rendered, ids, offsets, rules.stops)
    if not stopped:
        ids, trained = [*ids, _eos(conversation.where, rules)], trained + b"\x01"
    if sum(trained) < 2:
        raise DataError(
            f"{conversation.where}: nothing but the stop token would be trained.",
            "Remove the row, or use a model whose chat template shows its answer.",
        )
    if conversation.text is not None and rules.added_bos is not None and ids[:1] != [rules.added_bos]:
        ids, trained = [rules.added_bos, *ids], bytearray(1) + trained
    trained[0] = 0
    return Example(array("i", ids), bytes(trained), conversation.where, rendered.skipped_turns)


def _masked(
    rendered: _Rendered, ids: list[int], offsets: list[tuple[int, int]], stops: frozenset[int]
) -> tuple[list[int], bytearray, bool]:
    """Ids up to the last trained token, their mask, and whether that token is a stop token.

    What follows it teaches nothing, for a causal model never looks ahead.
    """
    trained = bytearray(len(ids))
    end, stopped = 0, False
    for span in rendered.spans:
        first, end = _token_range(offsets, span)
        end, stopped = _end_at_stop(rendered.text, ids, offsets, (first, end), stops)
        trained[first:end] = b"\x01" * (end - first)
    return ids[:end], trained[:end], stopped


def _token_range(offsets: list[tuple[int, int]], span: tuple[int, int]) -> tuple[int, int]:
    """Tokens that start inside the character span.

    Tokenizers that trim spaces from offsets give a token of spaces no width, at the end of its spaces. One
    that stands at the span's start therefore belongs to the prompt.
    """
    first = bisect_left(offsets, span[0], key=lambda offset: offset[0])
    end = bisect_left(offsets, span[1], lo=first, key=lambda offset: offset[0])
    while first < end and offsets[first] == (span[0], span[0]):
        first += 1
    return first, end


def _end_at_stop(
    text: str,
    ids: list[int],
    offsets: list[tuple[int, int]],
    tokens: tuple[int, int],
    stops: frozenset[int],
) -> tuple[int, bool]:
    """Where training of a turn ends: after its stop token if only white space follows, else at its end."""
    first, end = tokens
    at = end - 1
    while at >= first and ids[at] not in stops and not text[slice(*offsets[at])].strip():
        at -= 1
    stopped = at >= first and ids[at] in stops
    return (at + 1, True) if stopped else (end, False)


def _eos(where: str, rules: _Rules) -> int:
    if rules.eos is None:
        raise DataError(
            f"{where}: nothing would teach the model to stop: neither the chat template nor the tokenizer "
            "has an end token.",
            "Use a model whose tokenizer_config.json names an eos_token.",
        )
    return rules.eos
