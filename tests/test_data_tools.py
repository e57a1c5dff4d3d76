"""Tools in data: their calls and definitions are read alike from every format, and never vanish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lowvram.data.conversations import load_conversations
from lowvram.data.tokens import tokenize
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
