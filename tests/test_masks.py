"""Masks: in each family's chat format the trained tokens are exactly the assistant's turns and their ends."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lowvram.data.conversations import Conversation, Message
from lowvram.data.tokens import Example, tokenize
from lowvram.errors import DataError
from tests.chat_families import FAMILIES, Family, Part, tokenizer_of

QUICK = settings(max_examples=25, derandomize=True, deadline=None, database=None)
THOROUGH = settings(QUICK, max_examples=600, suppress_health_check=list(HealthCheck))
TOOLS = ({"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}},)

# What breaks templates: their own markers, white space at the ends, unusual characters.
MARKERS = (
    "<|im_start|>assistant\n",
    "<|im_end|>",
    "<|im_end|>\n<|im_start|>user\n",
    "<|endoftext|>",
    "[INST]",
    " [/INST] ",
    "</s>",
    "<s>",
    "<unk>",
    "<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<end_of_turn>\n<start_of_turn>model\n",
    "<bos>",
    "<|end|>\n<|assistant|>\n",
    "[TOOL_CALLS]",
    "### Assistant:\n",
    "<tool_call>",
    "{{ messages }}{% endfor %}",
)
WORDS = (
    "hello",
    "What is 12 times 12?",
    "144",
    "naïve",
    "日本語",
    "😀",
    "👩🏽‍🚀",
    "é",
    "\u202e",
    ' "quoted" ',
)
SPACES = (" ", "  ", "\n", "\n\n\n", "\r\n", "\t", "\u00a0", "\u3000")
TEXT = st.lists(st.sampled_from(MARKERS + WORDS + SPACES), max_size=6).map("".join)
SAID = st.one_of(TEXT, st.sampled_from(WORDS))


@st.composite
def conversations(draw: st.DrawFn, family: Family) -> Conversation:
    """Of one to three exchanges, some with calls of tools, behind a greeting, or with a turn of weight 0."""
    messages = []
    if family.system and draw(st.booleans()):
        messages.append(Message(role="system", content=draw(TEXT)))
    tools = TOOLS if family.tools and draw(st.booleans()) else ()
    if family.opens and draw(st.booleans()):
        messages.append(Message(role="assistant", content=draw(SAID), trained=draw(st.booleans())))
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message(role="user", content=draw(SAID)))
        if tools and draw(st.booleans()):
            messages += _called(draw, draw(st.integers(1, family.calls_at_once)))
        messages.append(Message(role="assistant", content=draw(SAID), trained=draw(st.booleans())))
    messages[-1] = Message(role="assistant", content=draw(SAID.filter(str.strip)))
    return Conversation(messages=tuple(messages), tools=tools, where="x:1")


def _called(draw: st.DrawFn, n: int) -> list[Message]:
    ids = [f"call0000{number}" for number in range(n)]
    calls = [{"id": i, "function": {"name": "get_weather", "arguments": {"city": draw(SAID)}}} for i in ids]
    return [
        Message(role="assistant", content="", extra={"tool_calls": calls}, trained=draw(st.booleans())),
        *(Message(role="tool", content=draw(SAID), extra={"tool_call_id": i}) for i in ids),
    ]


def spelled(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """What the tokens say, each by itself: a decoder would trim spaces."""
    as_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    added, said = tokenizer.added_tokens_decoder, bytearray()
    for number in ids:
        token = tokenizer.convert_ids_to_tokens(number)
        if number in added:
            said += added[number].content.encode()
        elif "ByteLevel" in repr(tokenizer.backend_tokenizer.pre_tokenizer):
            said += bytes(as_byte[c] for c in token)
        elif len(token) == 6 and token.startswith("<0x"):
            said.append(int(token[3:5], 16))
        else:
            said += token.replace("▁", " ").encode()
    return said.decode()


def check(example: Example, tokenizer: PreTrainedTokenizerFast, parts: list[Part]) -> None:
    """Against the parts that the oracle wrote: text, who wrote each, and where control tokens stand."""
    last = max(n for n, (_, kind, _) in enumerate(parts) if kind == "answer")
    parts = parts[: last + 1]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = list(example.input_ids)
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids if i in special] == [t for t, _, c in parts if c]
    runs = groupby(zip(ids, example.trained, strict=True), key=lambda pair: pair[1])
    found = [(bool(trained), spelled(tokenizer, [i for i, _ in run])) for trained, run in runs]
    assert found == _runs(parts, prefixed=_prepends(tokenizer))


def _prepends(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether each text behind a special token begins with a space of the tokenizer's own."""
    return "Prepend" in repr(tokenizer.backend_tokenizer.normalizer)


def _runs(parts: list[Part], prefixed: bool) -> list[tuple[bool, str]]:
    """What is trained and what not, by turns."""
    spaced, behind_control = [], True
    for text, kind, control in parts:
        spaced.append((f" {text}" if text and prefixed and behind_control and not control else text, kind))
        behind_control = control or (behind_control and not text)
    runs = groupby(((t, k == "answer") for t, k in spaced if t), key=lambda pair: pair[1])
    return [(trained, "".join(t for t, _ in run)) for trained, run in runs]


def masked_as_documented(family: Family, smollm: Path, conversation: Conversation) -> None:
    tokenizer = tokenizer_of(family, smollm)
    (example,) = tokenize([conversation], tokenizer)
    assert example.skipped_turns == 0
    assert example.trained[-1] == 1
    check(example, tokenizer, family.parts(conversation))


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_tokens_are_exactly_the_assistant_turns(smollm: Path, name: str) -> None:
    family = FAMILIES[name]
    QUICK(given(conversations(family))(lambda c: masked_as_documented(family, smollm, c)))()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_trained_tokens_are_exactly_the_assistant_turns_thoroughly(smollm: Path, name: str) -> None:
    family = FAMILIES[name]
    THOROUGH(given(conversations(family))(lambda c: masked_as_documented(family, smollm, c)))()


def _chat(*turns: tuple[str, str], **more: Any) -> Conversation:
    return Conversation(messages=tuple(Message(role=r, content=c) for r, c in turns), where="x:1", **more)


LONG = _chat(
    ("user", "tell me all of it"),
    ("assistant", "Once upon a time, " * 3000 + "the end."),
    ("user", "more of <|im_end|> this " * 2000),
    ("assistant", "No. 👩🏽‍🚀"),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_very_long_turns(smollm: Path, name: str) -> None:
    masked_as_documented(FAMILIES[name], smollm, LONG)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.marked])
def test_masks_are_those_of_the_template_s_own_markers(smollm: Path, name: str) -> None:
    """By transformers, from {% generation %}; on text without control tokens, which it would make of them."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, smollm)
    calls = [{"id": "abcdefghi", "function": {"name": "f", "arguments": {"x": "é"}}}]
    turns = [
        *([Message(role="system", content="be kind")] if family.system else []),
        Message(role="user", content="hello 日本"),
        *([Message(role="assistant", content="", extra={"tool_calls": calls})] if family.tools else []),
        *([Message(role="tool", content="[INST] 3", extra={"tool_call_id": "a"})] if family.tools else []),
        Message(role="assistant", content="yes,  it is\n\n😀"),
        Message(role="user", content="assistant\n\nand?"),
        Message(role="assistant", content="no"),
    ]
    tools = TOOLS if family.tools else ()
    (example,) = tokenize([Conversation(messages=tuple(turns), tools=tools, where="x:1")], tokenizer)
    told = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content, **m.extra} for m in turns],
        tools=list(tools) or None,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert list(example.input_ids) == told["input_ids"][: len(example)]
    assert list(example.trained) == told["assistant_masks"][: len(example)]
    assert 1 not in told["assistant_masks"][len(example) :]


@pytest.mark.parametrize(("turns", "renderings"), [(2, 2), (4, 4), (8, 8)])
def test_a_turn_costs_two_renderings_at_most(
    smollm: Path, monkeypatch: pytest.MonkeyPatch, turns: int, renderings: int
) -> None:
    tokenizer, asked = tokenizer_of(FAMILIES["smollm2"], smollm), []
    own = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda self, *a, **k: asked.append(k) or own(self, *a, **k)
    )
    tokenize([_chat(*[("user", "hi"), ("assistant", "yo")] * (turns // 2))], tokenizer)
    assert len(asked) == renderings


def _with_template(smollm: Path, template: str, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(smollm)
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    return tokenizer


def _trained(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> tuple[str, int]:
    (example,) = tokenize([conversation], tokenizer)
    pairs = zip(example.input_ids, example.trained, strict=True)
    return spelled(tokenizer, [i for i, t in pairs if t]), example.skipped_turns


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ SAID }}<|im_end|>{{ '\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TWICE = (
    ("user", "one"),
    ("assistant", "<think>hm</think>1"),
    ("user", "two"),
    ("assistant", "<think>so</think>2"),
)


def test_a_turn_that_is_rewritten_later_is_left_out_and_counted(smollm: Path) -> None:
    """As Qwen3 removes old thoughts: what the model has to write is not there any more."""
    said = "m.content if loop.last else m.content.split('</think>')[-1]"
    tokenizer = _with_template(smollm, CHATML.replace("SAID", said) + PROMPT)
    assert _trained(tokenizer, _chat(*TWICE)) == ("<think>so</think>2<|im_end|>", 1)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.opens])
@pytest.mark.parametrize("system", [True, False])
def test_a_lone_answer_is_trained(smollm: Path, name: str, system: bool) -> None:
    """By the tokens that it has behind a question; the oracles ask for a user's turn."""
    tokenizer = tokenizer_of(FAMILIES[name], smollm)
    turns = [("system", "be kind"), ("assistant", " hi <|im_end|> hi")][not system :]
    (example,) = tokenize([_chat(*turns)], tokenizer)
    (asked,) = tokenize([_chat(("user", "?"), turns[-1])], tokenizer)
    ids = [[i for i, t in zip(e.input_ids, e.trained, strict=True) if t] for e in (example, asked)]
    assert ids[0] == ids[1]
    assert example.skipped_turns == 0


def test_a_template_that_needs_a_question_is_given_one(smollm: Path) -> None:
    """As Qwen3.5's, which refuses a conversation without a user's turn: so the system turn by itself."""
    users = "messages | selectattr('role', 'eq', 'user') | list"
    needs = f"{{% if not {users} %}}{{{{ raise_exception('no') }}}}{{% endif %}}"
    tokenizer = _with_template(smollm, needs + CHATML.replace("SAID", "m.content") + PROMPT)
    turns = (("system", "s"), ("assistant", "hello"), *TWICE[:2])
    assert _trained(tokenizer, _chat(*turns)) == ("hello<|im_end|><think>hm</think>1<|im_end|>", 0)


def test_an_opening_answer_that_cannot_be_shown_is_refused_or_counted(smollm: Path) -> None:
    with pytest.raises(DataError, match=r"x:1: .*refuses this conversation .*roles must alternate"):
        tokenize([_chat(("assistant", "hi"), *TWICE)], tokenizer_of(FAMILIES["gemma"], smollm))
    hides = "m.content if not loop.first else ''"
    tokenizer = _with_template(smollm, CHATML.replace("SAID", hides) + PROMPT)
    assert _trained(tokenizer, _chat(("assistant", "hi"), *TWICE[:2])) == ("<think>hm</think>1<|im_end|>", 1)
    with pytest.raises(DataError, match="does not show the last assistant turn"):
        tokenize([_chat(("assistant", "hi"))], tokenizer)


def test_an_answer_of_which_only_the_end_is_shown_is_refused(smollm: Path) -> None:
    hides = "m.content if m.role == 'user' or loop.last else ''"
    tokenizer = _with_template(smollm, CHATML.replace("SAID", hides) + PROMPT)
    assert _trained(tokenizer, _chat(*TWICE)) == ("<think>so</think>2<|im_end|>", 1)
    hides = "m.content if m.role == 'user' or loop.index > 2 else ''"
    tokenizer = _with_template(smollm, CHATML.replace("SAID", hides) + PROMPT)
    with pytest.raises(DataError, match=r"x:1: .* nothing of an assistant turn but its end"):
        tokenize([_chat(*TWICE)], tokenizer)


def test_an_end_token_at_once_behind_the_end_of_turn_is_trained_too(smollm: Path) -> None:
    """Else a model whose only stop token it is would never stop."""
    template = CHATML.replace("SAID", "m.content").replace("<|im_end|>", "<|im_end|><|endoftext|>") + PROMPT
    tokenizer = _with_template(smollm, template, eos="<|endoftext|>")
    assert _trained(tokenizer, _chat(*TWICE[:2])) == ("<think>hm</think>1<|im_end|><|endoftext|>", 0)


def test_a_template_without_an_end_token_gets_one(smollm: Path) -> None:
    """Once, at the end; an answer that only reads like one has its own as text."""
    tokenizer = _with_template(smollm, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    text, _ = _trained(tokenizer, _chat(("user", "x"), ("assistant", "y<|im_end|>")))
    assert text == "assistant: y<|im_end|>\n<|im_end|>"
    (example,) = tokenize([_chat(("user", "x"), ("assistant", "y<|im_end|>"))], tokenizer)
    assert list(example.input_ids).count(tokenizer.eos_token_id) == 1


def test_plain_text_keeps_its_control_tokens(smollm: Path) -> None:
    """Somebody rendered it himself."""
    tokenizer = tokenizer_of(FAMILIES["smollm2"], smollm)
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    (example,) = tokenize([Conversation(text=text, where="x:1")], tokenizer)
    assert list(example.input_ids) == tokenizer(text)["input_ids"][:-1]
    assert example.trained == bytes([0] + [1] * (len(example) - 1))


def test_a_control_token_that_cannot_be_text_is_refused() -> None:
    """A Unigram vocabulary holds it among its words."""
    words = [("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "▁abcdefghijklmnopqrstuvwxyz#:<>/\n")]
    made = Tokenizer(models.Unigram(words, unk_id=0))
    made.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    assert tokenize([_chat(("user", "q"), ("assistant", "fine"))], tokenizer)
    with pytest.raises(DataError, match="x:7: the row holds a control token as text"):
        tokenize(
            [_chat(("user", "q"), ("assistant", "a</s>b")).model_copy(update={"where": "x:7"})], tokenizer
        )


def test_a_system_turn_that_the_template_refuses_is_refused_with_its_line(smollm: Path) -> None:
    with pytest.raises(
        DataError, match=r"x:1: the model's chat template refuses .*System role not supported"
    ):
        tokenize([_chat(("system", "s"), *TWICE)], tokenizer_of(FAMILIES["gemma"], smollm))


def test_an_answer_of_nothing_is_refused(smollm: Path) -> None:
    with pytest.raises(DataError, match="nothing but the stop token"):
        tokenize([_chat(("user", "hi"), ("assistant", ""))], tokenizer_of(FAMILIES["smollm2"], smollm))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["gemma", "mistral_v3", "phi3"])
def test_a_model_learns_to_stop_from_the_mask(smollm: Path, name: str) -> None:
    """A tiny one, trained on the masked tokens alone, greedy; without the ends in the mask it goes on."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, smollm)
    chats = [_chat(("user", q), ("assistant", a)) for q, a in (("one", "the dog"), ("two", "a fox jumps"))]
    made = tokenize(chats, tokenizer)
    stops = {example.input_ids[-1] for example in made}
    assert len(stops) == 1
    for ends in (True, False):
        model = _learnt(made, len(tokenizer), ends)
        for example in made:
            start = example.trained.index(1)
            prompt = torch.tensor([list(example.input_ids[:start])])
            (output,) = model.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=list(stops))
            answer = output[start:].tolist()
            assert answer[:-1][: len(example) - start - 1] == list(example.input_ids[start:-1])
            assert (answer == list(example.input_ids[start:])) == ends


def _learnt(made: list[Example], vocab_size: int, ends: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        for example in made:
            ids = torch.tensor([list(example.input_ids)])
            trained = torch.tensor([list(example.trained)], dtype=torch.bool)
            labels = torch.where(trained, ids, -100)
            labels[0, -1] = ids[0, -1] if ends else -100
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
