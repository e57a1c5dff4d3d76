"""Tools in data: their calls and definitions are read alike from every format, and never vanish."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from lowvram.data.conversations import load_conversations
from lowvram.data.prepared import prepare_rows
from lowvram.data.prompting import prompt_ids
from lowvram.data.shapes import Reading
from lowvram.data.template import Template
from lowvram.data.tokens import tokenize
from lowvram.errors import DataError
from tests.chat_families import FAMILIES, tokenizer_of


def _call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _tool(name: str, field: str) -> dict[str, Any]:
    properties = {field: {"type": "string", "enum": ["a", None]}}
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


def _row(*calls: dict[str, Any], tools: Any = ()) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": list(calls)},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three"},
    ]
    return {"messages": turns, "tools": list(tools)}


def _jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_arrow_s_filling_is_not_trained(tmp_path: Path, smollm: Path) -> None:
    """Rows whose calls have different arguments: the same tokens from JSON lines, parquet and a saved set."""
    rows = [
        _row(_call("f", {"at": {"x": 1}, "zip": "1"}), tools=[_tool("f", "zip")]),
        _row(_call("g", {"at": {"y": [None, 2]}, "city": "2"}), tools=[_tool("g", "city")]),
    ]
    names = [_jsonl(tmp_path / "a.jsonl", *rows), str(tmp_path / "a.parquet"), str(tmp_path / "saved")]
    Dataset.from_list(rows).to_parquet(names[1])
    Dataset.from_list(rows).save_to_disk(names[2])
    loaded = [load_conversations(name) for name in names]
    assert len({data.sha256 for data in loaded}) == 1
    tokenizer = tokenizer_of(FAMILIES["qwen2"], smollm)
    lines, *others = [tokenize(data.conversations, tokenizer) for data in loaded]
    for other in others:
        assert [e.input_ids for e in other] == [e.input_ids for e in lines]
    assert '"arguments": {"at": {"x": 1}, "zip": "1"}' in tokenizer.decode(lines[0].input_ids)


def test_a_null_that_somebody_wrote_stays(tmp_path: Path) -> None:
    name = _jsonl(tmp_path / "a.jsonl", _row(_call("f", {"zip": None})))
    (call,) = load_conversations(name).conversations[0].messages[1].extra["tool_calls"]
    assert call["function"]["arguments"] == {"zip": None}


@pytest.mark.parametrize("name", ["qwen2", "llama31", "mistral_v3"])
def test_openai_s_arguments_in_a_string_are_the_object(tmp_path: Path, smollm: Path, name: str) -> None:
    """Else the template would write them as JSON once more, with the quotes escaped."""
    asked = {"city": "Paris", "days": 2}
    rows = [_row({"id": "call00001", **_call("f", a)}) for a in (asked, json.dumps(asked))]
    for row in rows:
        row["messages"][2]["tool_call_id"] = "call00001"
    rows.append(json.loads(json.dumps(rows[0])))
    rows[2]["messages"][1]["tool_calls"] = json.dumps(rows[0]["messages"][1]["tool_calls"])
    data = load_conversations(_jsonl(tmp_path / "a.jsonl", *rows))
    tokenizer = tokenizer_of(FAMILIES[name], smollm)
    first, *others = tokenize(data.conversations, tokenizer)
    assert '{"city": "Paris", "days": 2}' in tokenizer.decode(first.input_ids)
    assert [(e.input_ids, e.trained) for e in others] == [(first.input_ids, first.trained)] * 2


@pytest.mark.parametrize("arguments", ["Paris", "", '{"city": ', "[1]", "3"])
def test_arguments_that_are_no_json_object_are_refused_with_their_place(
    tmp_path: Path, arguments: str
) -> None:
    name = _jsonl(tmp_path / "a.jsonl", _row(_call("f", {}), _call("g", arguments)))
    with pytest.raises(DataError, match="not a JSON object") as caught:
        load_conversations(name)
    place = "messages[1].tool_calls[1].function.arguments"
    assert caught.value.message.startswith(f"{name}:1: {place} is a string")


@pytest.mark.parametrize("calls", ["f()", {"name": "f"}, ["f"]])
def test_calls_that_are_no_list_of_objects_are_refused(tmp_path: Path, calls: Any) -> None:
    row = _row()
    row["messages"][1]["tool_calls"] = calls
    with pytest.raises(DataError, match=r":1: messages\[1\]\.tool_calls is "):
        load_conversations(_jsonl(tmp_path / "a.jsonl", row))


FIRST_ONLY = """{%- for m in messages -%}<|im_start|>{{ m.role }}
{{ m.content }}{{ m.tool_calls[0] | tojson if m.tool_calls else '' }}<|im_end|>
{% endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


@pytest.mark.parametrize("content", ["", "Let me look."])
@pytest.mark.parametrize(("name", "calls"), [("smollm2", 1), ("llama3", 2), ("gemma", 1), ("first only", 2)])
def test_a_template_that_leaves_calls_out_is_refused(
    tmp_path: Path, smollm: Path, name: str, calls: int, content: str
) -> None:
    """Else the model would learn to answer nothing, or to announce a call and make none."""
    row = _row(*[_call("f", {"x": n}) for n in range(calls)])
    row["messages"] = [row["messages"][0], {**row["messages"][1], "content": content}]
    data = load_conversations(_jsonl(tmp_path / "a.jsonl", row))
    tokenizer = copy(tokenizer_of(FAMILIES.get(name, FAMILIES["smollm2"]), smollm))
    tokenizer.chat_template = FIRST_ONLY if name == "first only" else tokenizer.chat_template
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*no place for a tool call") as caught:
        tokenize(data.conversations, tokenizer)
    assert "--skip-bad" in caught.value.remedy


def test_a_template_that_leaves_tools_out_is_refused(tmp_path: Path, smollm: Path) -> None:
    row = {"question": "hi", "answer": "yo", "tools": [_tool("f", "zip")]}
    (conversation,) = load_conversations(_jsonl(tmp_path / "a.jsonl", row)).conversations
    assert tokenize([conversation], tokenizer_of(FAMILIES["qwen2"], smollm))
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*no place for the tools of the row \(1\)"):
        tokenize([conversation], tokenizer_of(FAMILIES["smollm2"], smollm))
    with pytest.raises(DataError, match="knows no tools"):
        tokenize([conversation], tokenizer_of(FAMILIES["none"], smollm))


def test_a_template_that_adds_arguments_as_text_is_given_text(tmp_path: Path, smollm: Path) -> None:
    """As DeepSeek's: '```json' + call['function']['arguments']."""
    name = _jsonl(tmp_path / "a.jsonl", _row(_call("f", {"city": "Zürich"})))
    tokenizer = copy(tokenizer_of(FAMILIES["smollm2"], smollm))
    tokenizer.chat_template = FIRST_ONLY.replace(
        "m.tool_calls[0] | tojson", "'CALL ' + m.tool_calls[0]['function']['arguments']"
    )
    (example,) = tokenize(load_conversations(name).conversations, tokenizer)
    trained = [i for i, t in zip(example.input_ids, example.trained, strict=True) if t]
    assert tokenizer.decode(trained) == 'CALL {"city": "Zürich"}<|im_end|>three<|im_end|>'
    assert prompt_ids(load_conversations(name).conversations[0].messages[:3], tokenizer)


def test_data_check_counts_rows_whose_calls_are_left_out(
    tmp_path: Path, smollm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SmolLM2's own template; it said 0 bad rows."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    called = [_row(_call("f", {"x": n}), tools=[_tool("f", "x")]) for n in range(3)]
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    name = _jsonl(tmp_path / "a.jsonl", *called, row)
    store = prepare_rows(name, Reading(), AutoTokenizer.from_pretrained(smollm), keep_bad=True)
    assert (len(store), len(store.bad_rows)) == (1, 3)


@pytest.mark.parametrize(("tools", "calls", "renderings"), [(0, 0, 2), (1, 0, 3), (0, 1, 5), (1, 2, 7)])
def test_a_row_is_rendered_as_often_as_it_must(
    tmp_path: Path, smollm: Path, monkeypatch: pytest.MonkeyPatch, tools: int, calls: int, renderings: int
) -> None:
    """Twice for each assistant turn, once more for the tools and for each call (data/turns.py says so)."""
    called = [_call("f", {"x": n}) for n in range(calls)]
    row = _row(*called, tools=[_tool("f", "x")] * tools)
    if not calls:
        row["messages"] = [row["messages"][0], row["messages"][3]]
    data = load_conversations(_jsonl(tmp_path / "a.jsonl", row))
    tokenizer, texts = tokenizer_of(FAMILIES["qwen2"], smollm), []
    text = Template.text

    def counted(self: Template, *args: Any, **flags: Any) -> str:
        texts.append(text(self, *args, **flags))
        return texts[-1]

    tokenize(data.conversations, tokenizer)  # what is rendered once for a tokenizer
    monkeypatch.setattr(Template, "text", counted)
    tokenize(data.conversations, tokenizer)
    assert len(texts) == renderings
