"""Conversations: each known shape becomes the same turns, and a doubtful row is refused with its line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lowvram.data.conversations import SHAPES, Conversation, Message, content_sha256, load_conversations
from lowvram.errors import DataError


def _file(tmp_path: Path, *rows: dict[str, Any], name: str = "train.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def _error(path: str) -> DataError:
    with pytest.raises(DataError) as caught:
        load_conversations(path)
    assert caught.value.remedy
    return caught.value


HI = [("user", "hi"), ("assistant", "hello")]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]

GOOD: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("messages", {"id": 7, "messages": MESSAGES}, HI),
    ("sharegpt", {"conversations": SHAREGPT}, HI),
    ("sharegpt", {"conversations": MESSAGES}, HI),
    ("sharegpt", {"system": "be kind", "conversations": SHAREGPT}, [("system", "be kind"), *HI]),
    ("sharegpt", {"system": "", "conversations": SHAREGPT}, HI),
    (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "be kind"}, *SHAREGPT]},
        [("system", "be kind"), *HI],
    ),
    ("alpaca", {"instruction": "hi", "output": "hello"}, HI),
    ("alpaca", {"instruction": "hi", "input": "", "output": "hello"}, HI),
    ("alpaca", {"instruction": "hi", "input": None, "output": "hello"}, HI),
    (
        "alpaca",
        {"instruction": "add", "input": "1 2", "output": "3"},
        [("user", "add\n\n1 2"), ("assistant", "3")],
    ),
    ("prompt-completion", {"prompt": "hi", "completion": "hello"}, HI),
    ("prompt-completion", {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, HI),
    ("prompt-completion", {"prompt": MESSAGES[:1], "completion": "hello"}, HI),
    ("question-answer", {"question": "hi", "answer": "hello"}, HI),
    ("conversation", {"conversation": SHAREGPT}, HI),
    ("sharegpt", {"conversations": [{"from": "user", "value": "hi"}, {"from": "bot", "value": "hello"}]}, HI),
    ("instruction-response", {"instruction": "hi", "context": "", "response": "hello"}, HI),
    (
        "instruction-response",
        {"instruction": "add", "context": "1 2", "response": "3", "category": "math"},
        [("user", "add\n\n1 2"), ("assistant", "3")],
    ),
    (
        "question-response",
        {"id": 1, "system_prompt": "be kind", "question": "hi", "response": "hello"},
        [("system", "be kind"), *HI],
    ),
    ("question-response", {"system_prompt": "", "question": "hi", "response": "hello"}, HI),
    ("prompt-response", {"prompt": "hi", "response": "hello"}, HI),
    ("query-response", {"query": "hi", "response": "hello", "type": "x"}, HI),
    ("problem-solution", {"problem": "hi", "solution": "hello", "answer": "7"}, HI),
    ("inputs-targets", {"inputs": "hi", "targets": "hello"}, HI),
    ("input-output", {"input": "hi", "output": "hello"}, HI),
    ("question-answer", {"question": "hi", "answer": "hello", "text": "### hi hello"}, HI),
]


@pytest.mark.parametrize(("shape", "row", "turns"), GOOD)
def test_every_shape_becomes_turns(
    tmp_path: Path, shape: str, row: dict[str, Any], turns: list[tuple[str, str]]
) -> None:
    path = _file(tmp_path, row, row)
    data = load_conversations(path)
    assert data.shape == shape
    assert data.name == path
    assert [_turns(c) for c in data.conversations] == [turns, turns]
    assert [c.where for c in data.conversations] == [f"{path}:1", f"{path}:2"]


def test_plain_text(tmp_path: Path) -> None:
    data = load_conversations(_file(tmp_path, {"text": " once upon a time "}))
    assert (data.shape, data.conversations[0].text) == ("text", " once upon a time ")


def test_tool_calls_and_tools_are_kept_for_the_template(tmp_path: Path) -> None:
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    tool = {"type": "function", "function": {"name": "f"}}
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "", "name": "f"},
        {"role": "assistant", "content": "hello", "tool_calls": None},
    ]
    rows = [{"messages": turns, "tools": [tool]}, {"messages": turns, "tools": json.dumps([tool])}]
    for conversation in load_conversations(_file(tmp_path, *rows)).conversations:
        assert conversation.messages[1].extra == {"tool_calls": call}
        assert conversation.messages[2].extra == {"name": "f"}
        assert conversation.messages[3].extra == {}
        assert conversation.tools == (tool,)


def test_content_in_text_parts_is_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    row = {"messages": [MESSAGES[0], {"role": "assistant", "content": parts}]}
    assert _turns(load_conversations(_file(tmp_path, row)).conversations[0]) == HI


def _answer(content: Any) -> dict[str, Any]:
    return {"messages": [MESSAGES[0], {"role": "assistant", "content": content}]}


def _weighted(*weights: Any) -> dict[str, Any]:
    """One exchange for each weight."""
    turns = []
    for number, weight in enumerate(weights):
        turns += [{"role": "user", "content": f"q{number}"}]
        turns += [{"role": "assistant", "content": f"a{number}", "weight": weight}]
    return {"messages": turns}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"question": "q", "answer": ""}, "the field 'answer' is empty"),
    ({"question": " \n", "answer": "a"}, "the field 'question' is empty"),
    ({"question": "q", "answer": 42}, "the field 'answer' is a int, not a string"),
    ({"question": "q", "answer": None}, "the field 'answer' is null"),
    ({"instruction": "q", "input": 3, "output": "a"}, "the field 'input' is a int"),
    ({"text": ["a"]}, "the field 'text' is a list"),
    ({"messages": []}, "'messages' is not a list of turns, or is empty"),
    ({"messages": "hi"}, "'messages' is not a list of turns"),
    ({"messages": ["hi"]}, "messages[0] is a str"),
    ({"messages": MESSAGES[:1]}, "the last turn is the user's"),
    ({"messages": [*MESSAGES, MESSAGES[0]]}, "the last turn is the user's"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0] has the unknown role 'wizard'"),
    ({"messages": [{"speaker": "user", "content": "x"}]}, "its fields are speaker, content"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
    (_answer(""), "'messages[1].content' is empty"),
    (_answer(None), "'messages[1].content' is null"),
    (_answer([{"type": "image_url"}]), "messages[1] holds something other than text"),
    ({"messages": MESSAGES, "tools": "nonsense"}, "'tools' is a string, but not JSON"),
    ({"messages": MESSAGES, "tools": ["f"]}, "'tools' is not a list of objects"),
    ({"prompt": "p", "completion": [MESSAGES[0]]}, "the last turn is the user's"),
    ({"system": 3, "question": "q", "answer": "a"}, "the field 'system' is a int"),
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "its fields are prompt, chosen, rejected"),
    ({"messages": [{"role": "system", "content": ""}]}, "nothing but an empty system turn"),
    (_weighted(0, 0), "every assistant turn has the weight 0"),
    (_weighted(1, 2), "messages[3] has the weight 2"),
    (_weighted("0"), "messages[1] has the weight '0'"),
    (_weighted(True), "messages[1] has the weight True"),
    ({}, "its fields are none"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_doubtful_row_is_refused_with_its_line(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    path = _file(tmp_path, row)
    message = _error(path).message
    assert message.startswith(f"{path}:1: ")
    assert reason in message


def test_an_unknown_shape_lists_all_known_ones(tmp_path: Path) -> None:
    remedy = _error(_file(tmp_path, {"foo": 1})).remedy
    assert all(shape in remedy for shape in SHAPES)


@pytest.mark.parametrize(
    ("second", "seen"),
    [
        ({"text": "x"}, "has the shape 'text'"),
        ({"question": "x"}, "has the fields question, no known shape"),
    ],
)
def test_a_changed_shape_names_both_places_and_shapes(
    tmp_path: Path, second: dict[str, Any], seen: str
) -> None:
    path = _file(tmp_path, {"question": "q", "answer": "a"}, second)
    error = _error(path)
    assert error.message == f"{path}:2: {seen}, but {path}:1 has the shape 'question-answer'."
    assert "question, answer" in error.remedy


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = _file(tmp_path, {"text": "a"}, {"text": "b"}, {"broken": 1})
    assert [c.text for c in load_conversations(path, limit=2).conversations] == ["a", "b"]
    _error(path)


def test_the_hash_is_of_the_content_and_its_order_alone(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]

    def digest(name: str, *rows: dict[str, Any]) -> str:
        return load_conversations(_file(tmp_path, *rows, name=name)).sha256

    first = digest("x.jsonl", *rows)
    assert first == digest("y.ndjson", *({"id": i, **row} for i, row in enumerate(rows)))
    assert first == digest("z.jsonl", *({"prompt": r["question"], "completion": r["answer"]} for r in rows))
    assert first != digest("x.jsonl", *reversed(rows))
    assert first != digest("x.jsonl", rows[0])


def test_the_hash_of_a_conversation_is_pinned() -> None:
    """The held-out split depends on it: a change would mix old runs' held-out rows into training."""
    conversation = Conversation(
        messages=(Message(role="user", content="é"), Message(role="assistant", content="b")), where="x:1"
    )
    assert content_sha256(conversation) == PINNED
    assert content_sha256(conversation.model_copy(update={"where": "y:2"})) == PINNED
    assert content_sha256(conversation.model_copy(update={"tools": ({"a": 1},)})) != PINNED


PINNED = "afa0cc007f9cc6653a3249048f082aeffb36cbe76043b938c415fe5f604e2899"


def test_a_conversation_is_either_turns_or_text() -> None:
    with pytest.raises(ValidationError, match="either messages or text"):
        Conversation(where="x:1")
    with pytest.raises(ValidationError, match="either messages or text"):
        Conversation(messages=(Message(role="assistant", content="b"),), text="a", where="x:1")


def test_a_weight_says_which_turns_are_trained(tmp_path: Path) -> None:
    """What follows the last trained one is left out, and 1 trains as if nothing was written."""
    rows = [_weighted(0, 1, 0), _weighted(1, 1.0), _weighted(None, None)]
    first, *others = load_conversations(_file(tmp_path, *rows)).conversations
    assert [(m.content, m.trained) for m in first.messages] == [
        ("q0", True),
        ("a0", False),
        ("q1", True),
        ("a1", True),
    ]
    assert [[(m.content, m.trained) for m in c.messages] for c in others] == [
        [("q0", True), ("a0", True), ("q1", True), ("a1", True)]
    ] * 2
    assert content_sha256(first) != content_sha256(others[0])


def test_weights_of_1_leave_the_hash_of_a_row_as_it_was(tmp_path: Path) -> None:
    """As lowvram wrote it into plans before it read weights: else their runs could not be resumed."""
    (row,) = load_conversations(_file(tmp_path, _weighted(1))).conversations
    turns = [
        {"role": "user", "content": "q0", "extra": {}},
        {"role": "assistant", "content": "a0", "extra": {"weight": 1}},
    ]
    before = json.dumps({"messages": turns, "text": None, "tools": ()}, sort_keys=True)
    assert content_sha256(row) == hashlib.sha256(before.encode()).hexdigest()


@pytest.mark.parametrize("content", ["", None, []])
def test_an_empty_system_turn_is_none(tmp_path: Path, content: Any) -> None:
    rows = [{"messages": [{"role": "system", "content": content}, *MESSAGES]}, {"messages": MESSAGES}]
    first, second = load_conversations(_file(tmp_path, *rows)).conversations
    assert (_turns(first), content_sha256(first)) == (HI, content_sha256(second))
