"""Shapes and the flags about them: what is told is obeyed or refused, and goes into the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowvram.data.conversations import load_conversations
from lowvram.data.shapes import SHAPES, Known, Reading, known_from, reading_from
from lowvram.errors import ConfigError, DataError
from lowvram.planner.plan import _yaml_lines
from lowvram.planner.profiles import parse_yaml

TURNS = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]


def _file(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _turns(path: str, reading: Reading) -> list[tuple[str, str]]:
    (conversation,) = load_conversations(path, reading).conversations
    return [(message.role, message.content) for message in conversation.messages]


def test_a_row_of_several_shapes_is_what_the_user_says(tmp_path: Path) -> None:
    path = _file(tmp_path, {"question": "q", "answer": "a", "text": "t", "prompt": "p", "completion": "c"})
    assert _turns(path, Reading()) == [("user", "p"), ("assistant", "c")]
    assert _turns(path, reading_from("question-answer", None, None, False))[1] == ("assistant", "a")
    text = load_conversations(path, reading_from("text", None, None, False))
    assert (text.shape, text.conversations[0].text) == ("text", "t")


@pytest.mark.parametrize(
    ("row", "fields", "shape"),
    [
        ({"ask": "hi", "reply": "yo"}, "question=ask,answer=reply", "question-answer"),
        ({"ask": "hi", "reply": "yo"}, "prompt = ask , completion=reply", "prompt-completion"),
        ({"answer": "hi", "question": "yo"}, "question=answer,answer=question", "question-answer"),
        ({"prompt": "hi", "reply": "yo"}, "completion=reply", "prompt-completion"),
        (
            {"log": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]},
            "messages=log",
            "messages",
        ),
        (
            {"messages": [{"who": "human", "said": "hi"}, {"who": "gpt", "said": "yo"}]},
            "role=who,content=said",
            "messages",
        ),
    ],
)
def test_fields_under_other_names(tmp_path: Path, row: dict[str, Any], fields: str, shape: str) -> None:
    reading = reading_from(None, fields, None, False)
    assert reading.shape == shape
    assert _turns(_file(tmp_path, row), reading) == [("user", "hi"), ("assistant", "yo")]


def test_a_system_text_under_another_name(tmp_path: Path) -> None:
    reading = reading_from(None, "question=q,answer=a,system=rules", None, False)
    path = _file(tmp_path, {"q": "hi", "a": "yo", "rules": "be kind"})
    assert _turns(path, reading)[0] == ("system", "be kind")


@pytest.mark.parametrize(
    ("shape", "fields", "says"),
    [
        ("alpacca", None, "no known shape"),
        (None, "question", "no list of different"),
        (None, "question=", "no list of different"),
        (None, "question=a,question=b", "no list of different"),
        (None, "foo=a", "no shape has the fields foo"),
        (None, "messages=a,text=b", "no shape has the fields messages, text together"),
        ("text", "question=a", "the shape 'text' has no field 'question'"),
        ("question-answer", "role=who", "has no field 'role'"),
    ],
)
def test_flags_that_no_shape_obeys_are_refused(shape: str | None, fields: str | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        reading_from(shape, fields, None, False)
    assert caught.value.remedy


def test_a_row_without_a_named_field_is_refused_with_its_line(tmp_path: Path) -> None:
    path = _file(tmp_path, {"q": "hi", "a": "yo"}, {"q": "hi", "b": "yo"})
    reading = reading_from(None, "question=q,answer=a", None, False)
    with pytest.raises(DataError, match=r"train\.jsonl:2: no field 'a', which --fields names; .* q, b"):
        load_conversations(path, reading)


def test_a_told_shape_that_a_row_has_not(tmp_path: Path) -> None:
    path = _file(tmp_path, {"text": "x"})
    with pytest.raises(DataError, match="has the shape 'text', but it is read as the shape 'messages'"):
        load_conversations(path, Reading(shape="messages"))


def test_fields_that_nobody_reads_are_known() -> None:
    row = {"id": 1, "question": "q", "answer": "a", "system": "s", "context": "c"}
    assert known_from("x:1", row, Reading()).unread(row) == ("id", "context")
    told = Known("question-answer", "", {"question": "id"})
    assert told.unread(row) == ("question", "context")


def test_every_shape_finds_itself() -> None:
    for name, shape in SHAPES.items():
        assert known_from("x:1", dict.fromkeys(shape.needs, "x"), Reading()) == Known(name, "x:1", {})


def test_it_survives_a_plan_file(tmp_path: Path) -> None:
    reading = Reading(shape="alpaca", fields={"output": "true answer: x"}, split="train[:10%]", skip_bad=True)
    file = tmp_path / "r.yaml"
    file.write_text("".join(_yaml_lines(reading)))
    assert parse_yaml(Reading, file) == reading
    file.write_text("shape: alpacca\n")
    with pytest.raises(ConfigError, match="alpacca"):
        parse_yaml(Reading, file)
