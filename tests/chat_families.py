"""Chat formats as their models' makers document them: a tokenizer of the kind, its template, and an oracle.

The oracle writes a conversation down by itself, part by part; it shares nothing with the templates or with
lowvram but the documented formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lowvram.data.conversations import Conversation

Kind = Literal["prompt", "answer"]
Part = tuple[str, Kind, bool]  # text, who writes it, whether it is a control token
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Family:
    """One model family's format."""

    name: str
    parts: Callable[[Conversation], list[Part]]
    bos: str | None
    eos: str
    special: tuple[str, ...]
    base: Literal["smollm2", "metaspace", "prepend"] = "smollm2"
    added: tuple[str, ...] = ()  # tokens that are not special
    swallowing: bool = False  # whether special tokens take the white space to their right
    system: bool = True
    tools: bool = False
    calls_at_once: int = 2
    opens: bool = True  # whether the assistant may speak first

    @property
    def template(self) -> str | None:
        """None of the family that stands for models without one."""
        file = TEMPLATES / f"{self.name}.jinja"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    @property
    def marked(self) -> bool:
        """Whether the template marks what the assistant writes."""
        return "{%- generation -%}" in (self.template or "")


def _c(text: str, kind: Kind = "prompt") -> Part:
    return text, kind, True


def _p(text: str) -> Part:
    return text, "prompt", False


def _kind(message: Any) -> Kind:
    return "answer" if message.role == "assistant" and message.trained else "prompt"


def _turns(c: Conversation) -> tuple[str | None, list[Any]]:
    system = c.messages[0].content if c.messages[0].role == "system" else None
    return system, list(c.messages[system is not None :])


def _calls(message: Any) -> list[tuple[str, str, str]]:
    """(name, arguments as JSON, id) of each call."""
    return [
        (call["function"]["name"], _json(call["function"]["arguments"]), call["id"])
        for call in message.extra.get("tool_calls", ())
    ]


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def smollm2(c: Conversation) -> list[Part]:
    system, turns = _turns(c)
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    parts = [_c("<|im_start|>"), _p(f"system\n{default if system is None else system}"), _c("<|im_end|>")]
    return parts + _chatml(turns)


def _chatml(turns: list[Any]) -> list[Part]:
    parts: list[Part] = [_p("\n")]
    for message in turns:
        kind = _kind(message)
        parts += [_c("<|im_start|>"), _p(f"{message.role}\n"), (message.content, kind, False)]
        parts += [_c("<|im_end|>", kind), _p("\n")]
    return parts


def qwen2(c: Conversation) -> list[Part]:
    system, turns = _turns(c)
    head = "You are a helpful assistant." if system is None else system
    if c.tools:
        head += "\n\n# Tools\n\nYou are provided with function signatures within <tools></tools> XML tags:\n"
        head += "<tools>\n" + "\n".join(map(_json, c.tools)) + "\n</tools>\n\n"
        head += "Return each call within <tool_call></tool_call> XML tags."
    parts = [_c("<|im_start|>"), _p(f"system\n{head}"), _c("<|im_end|>"), _p("\n")]
    for at, message in enumerate(turns):
        if message.role == "assistant":
            calls = [
                f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>'
                for n, a, _ in _calls(message)
            ]
            said = "\n".join(([message.content] if message.content or not calls else []) + calls)
            kind = _kind(message)
            parts += [_c("<|im_start|>"), _p("assistant\n"), (said, kind, False), _c("<|im_end|>", kind)]
            parts += [_p("\n")]
        elif message.role == "tool":
            if turns[at - 1].role != "tool":
                parts += [_c("<|im_start|>"), _p("user")]
            parts += [_p(f"\n<tool_response>\n{message.content}\n</tool_response>")]
            if turns[at + 1].role != "tool":
                parts += [_c("<|im_end|>"), _p("\n")]
        else:
            parts += [_c("<|im_start|>"), _p(f"user\n{message.content}"), _c("<|im_end|>"), _p("\n")]
    return parts


def _headed(role: str, text: str, kind: Kind = "prompt") -> list[Part]:
    head = [_c("<|start_header_id|>"), _p(role), _c("<|end_header_id|>"), _p("\n\n")]
    return [*head, (text, kind, False), _c("<|eot_id|>", kind)]


def llama3(c: Conversation) -> list[Part]:
    parts = [_c("<|begin_of_text|>")]
    for m in c.messages:
        parts += _headed(m.role, m.content.strip(), _kind(m))
    return parts


def llama31(c: Conversation) -> list[Part]:
    system, turns = _turns(c)
    head = "Environment: ipython\n" if c.tools else ""
    head += "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n" + (system or "").strip()
    parts = [_c("<|begin_of_text|>"), *_headed("system", head)]
    for at, m in enumerate(turns):
        if m.role == "tool":
            parts += _headed("ipython", _json(m.content))
        elif _calls(m):
            name, arguments, _ = _calls(m)[0]
            parts += _headed("assistant", f'{{"name": "{name}", "parameters": {arguments}}}', _kind(m))
        elif m.role == "user" and at == 0 and c.tools:
            listed = "".join(f"{_json(tool, 4)}\n\n" for tool in c.tools)
            said = f"Answer with a call of one of these functions:\n\n{listed}{m.content.strip()}"
            parts += _headed("user", said)
        else:
            parts += _headed(m.role, m.content.strip(), _kind(m))
    return parts


def llama2(c: Conversation) -> list[Part]:
    system, turns = _turns(c)
    parts: list[Part] = []
    for at, m in enumerate(turns):
        if m.role == "user":
            head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system is not None and at == 0 else ""
            parts += [_c("<s>"), _p(f"[INST] {head}{m.content.strip()} [/INST]")]
        else:
            parts += [(f" {m.content.strip()} ", _kind(m), False), _c("</s>", _kind(m))]
    return parts


def mistral_v1(c: Conversation) -> list[Part]:
    system, turns = _turns(c)
    parts = [_c("<s>")]
    for at, m in enumerate(turns):
        if m.role == "user":
            head = f"{system}\n\n" if system is not None and at == 0 else ""
            parts += [_p(f"[INST] {head}{m.content} [/INST]")]
        else:
            parts += [(f" {m.content}", _kind(m), False), _c("</s>", _kind(m))]
    return parts


def mistral_v3(c: Conversation) -> list[Part]:
    system, turns = _turns(c)
    last_user = max(at for at, m in enumerate(turns) if m.role == "user")
    parts = [_c("<s>")]
    for at, m in enumerate(turns):
        if m.role == "user":
            if c.tools and at == last_user:
                parts += [_c("[AVAILABLE_TOOLS]"), _p(f" {_json(c.tools)}"), _c("[/AVAILABLE_TOOLS]")]
            head = f"{system}\n\n" if system is not None and at == last_user else ""
            parts += [_c("[INST]"), _p(f" {head}{m.content}"), _c("[/INST]")]
        elif m.role == "tool":
            said = f' {{"content": {_json(m.content)}, "call_id": "{m.extra["tool_call_id"]}"}}'
            parts += [_c("[TOOL_RESULTS]"), _p(said), _c("[/TOOL_RESULTS]")]
        elif _calls(m):
            calls = [f'{{"name": "{n}", "arguments": {a}, "id": "{i}"}}' for n, a, i in _calls(m)]
            said = f" [{', '.join(calls)}]"
            parts += [_c("[TOOL_CALLS]", _kind(m)), (said, _kind(m), False), _c("</s>", _kind(m))]
        else:
            parts += [(f" {m.content}", _kind(m), False), _c("</s>", _kind(m))]
    return parts


def gemma(c: Conversation) -> list[Part]:
    parts = [_c("<bos>")]
    for m in c.messages:
        answered = m.role == "assistant"
        kind = _kind(m)
        parts += [_c("<start_of_turn>"), _p("model\n" if answered else "user\n")]
        parts += [(m.content.strip(), kind, False), _c("<end_of_turn>", kind), _p("\n")]
    return parts


def phi3(c: Conversation) -> list[Part]:
    """<|user|> and the others take the white space to their right, so the template's new lines go with them.

    What the conversation itself has there stays only of a trained turn: else it cannot be told from theirs.
    """
    parts: list[Part] = []
    for m in c.messages:
        kind = _kind(m)
        said = m.content if kind == "answer" else m.content.lstrip()
        parts += [_c(f"<|{m.role}|>"), (said, kind, False), _c("<|end|>", kind)]
    return parts


def no_template(c: Conversation) -> list[Part]:
    """What lowvram does for a model without a template: plain headings."""
    parts = [_c("<|endoftext|>")]
    for m in c.messages:
        parts += [_p(f"### {m.role.capitalize()}:\n")]
        parts += [(m.content, _kind(m), False)]
        parts += [_c("<|im_end|>", _kind(m))] if m.role == "assistant" else []
        parts += [_p("\n\n")]
    return parts


_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", *_HEADERS)
_V3 = ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS")
_MISTRAL_V3 = ("<unk>", "<s>", "</s>", "[TOOL_CALLS]", *(f"[{s}{t}]" for t in _V3 for s in ("", "/")))
_GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_PHI3 = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
_LLAMA2 = ("<unk>", "<s>", "</s>")
FAMILIES = {
    family.name: family
    for family in (
        Family("none", no_template, "<|endoftext|>", "<|im_end|>", ()),
        Family("smollm2", smollm2, "<|im_start|>", "<|im_end|>", ()),
        Family("qwen2", qwen2, None, "<|im_end|>", (), added=("<tool_call>", "</tool_call>"), tools=True),
        Family("llama3", llama3, "<|begin_of_text|>", "<|eot_id|>", _LLAMA3),
        Family("llama31", llama31, "<|begin_of_text|>", "<|eot_id|>", _LLAMA3, tools=True, calls_at_once=1),
        Family("llama2", llama2, "<s>", "</s>", _LLAMA2, base="prepend", opens=False),
        Family("mistral_v1", mistral_v1, "<s>", "</s>", _LLAMA2, base="prepend", opens=False),
        Family("mistral_v3", mistral_v3, "<s>", "</s>", _MISTRAL_V3, base="metaspace", tools=True),
        Family("gemma", gemma, "<bos>", "<eos>", _GEMMA, base="metaspace", system=False, opens=False),
        Family("phi3", phi3, "<s>", "<|endoftext|>", _PHI3, base="prepend", swallowing=True),
    )
}


@cache
def tokenizer_of(family: Family, smollm: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's own BPE, or a small one like sentencepiece's, with the family's special tokens."""
    if family.base == "smollm2":
        made = Tokenizer.from_file(str(smollm / "tokenizer.json"))
    else:
        made = _sentencepiece_like(family)
    own = [AddedToken(t, special=True, normalized=False, rstrip=family.swallowing) for t in family.special]
    made.add_special_tokens(own)
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )


_TEXT = """The quick brown fox jumps over the lazy dog. What is 12 times 12? It is 144, and that is all.
[INST]  hello  world </s> user model assistant [/INST] answer: "name" {"arguments": 1} <|end|> <start_of_turn>
"""


def _sentencepiece_like(family: Family) -> Tokenizer:
    """BPE over words that carry their space, all other characters as bytes; as Llama 2, Mistral and Gemma."""
    space = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = space
    learner.train_from_iterator([_TEXT] * 4, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    words = [*family.special, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"], "\n", "\n\n"]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    merges = [tuple(m) for m in learned["merges"]] + [("\n", "\n")]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    if family.base == "prepend":  # a space before each text, also behind each special token
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif family.name == "gemma":
        made.normalizer = replace
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made
