"""Data: shapes, refusals with file and line, cutting, split and order."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from lowvram import data_view
from lowvram.data.conversations import Conversation, Message, content_sha256, load_conversations
from lowvram.data.order import batches_of_epoch
from lowvram.data.split import split_held_out
from lowvram.data.tokens import cut, tokenize
from lowvram.engine.source import ModelSource
from lowvram.errors import DataError

ROWS = {
    "messages": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    "alpaca": {"instruction": "hi", "input": "", "output": "yo"},
    "prompt-completion": {"prompt": "hi", "completion": "yo"},
    "question-answer": {"question": "hi", "answer": "yo"},
    "text": {"text": "hi yo"},
}


def _file(folder: Path, *lines: str) -> str:
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("shape", ROWS)
def test_every_shape_is_known(tmp_path: Path, shape: str) -> None:
    data = load_conversations(_file(tmp_path, json.dumps(ROWS[shape])))
    assert data.shape == shape
    conversation = data.conversations[0]
    if shape == "text":
        assert conversation.text == "hi yo"
    else:
        assert [(m.role, m.content) for m in conversation.messages] == [("user", "hi"), ("assistant", "yo")]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([""], "train.jsonl"),
        ([json.dumps(ROWS["question-answer"])] * 6 + ["{not json"], "train.jsonl:7"),
        ([json.dumps({"foo": 1})], "train.jsonl:1"),
        ([json.dumps(ROWS["alpaca"]), json.dumps(ROWS["text"])], "train.jsonl:2"),
        ([json.dumps(ROWS["text"]), "[1]"], "train.jsonl:2"),
    ],
    ids=["empty", "not JSON on line 7", "unknown shape", "mixed", "not an object"],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path: Path, lines: list[str], says: str) -> None:
    with pytest.raises(DataError) as caught:
        load_conversations(_file(tmp_path, *lines))
    assert says in caught.value.message
    assert caught.value.remedy


def test_cut_keeps_the_beginning(smollm: Path) -> None:
    tokenizer = ModelSource(str(smollm)).tokenizer
    messages = (Message(role="user", content="hi"), Message(role="assistant", content="one two three four"))
    (example,) = tokenize([Conversation(messages=messages, where="x:1")], tokenizer)
    shorter = cut(example, len(example.input_ids) - 3)
    assert shorter is not None
    assert tuple(shorter.input_ids) == tuple(example.input_ids[:-3])
    assert cut(example, 3) is None


def _digests(rows: list[Conversation]) -> npt.NDArray[np.bytes_]:
    return np.array([bytes.fromhex(content_sha256(row)) for row in rows], dtype="S32")


def test_split_is_by_content() -> None:
    rows = [Conversation(text=f"row {i % 90}", where=f"x:{i}") for i in range(100)]
    train, held = split_held_out(_digests(rows), 0.1)
    assert sorted([*train, *held]) == list(range(100))
    assert 5 <= len(held) <= 10
    assert not {rows[i].text for i in train} & {rows[i].text for i in held}
    back = list(reversed(rows))
    assert {back[i].text for i in split_held_out(_digests(back), 0.1)[1]} == {rows[i].text for i in held}


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.integers(1, 8))
def test_the_smallest_digests_are_held_out_with_their_copies(content: list[int], at_most: int) -> None:
    """Runs of older versions are resumed: their held-out rows must stay held out. The rule, row by row."""
    assume(len(set(content)) > 1)
    rows = [Conversation(text=f"row {n}", where="x:1") for n in content]
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(content_sha256(row), []).append(index)
    wanted, expected = min(max(round(0.2 * len(rows)), 1), at_most, len(rows) - 1), []
    for digest in sorted(groups):
        if len(expected) + len(groups[digest]) <= wanted:
            expected += groups[digest]
    if not expected:
        expected = min((groups[digest] for digest in sorted(groups)), key=len)
    assert split_held_out(_digests(rows), 0.2, at_most=at_most)[1].tolist() == sorted(expected)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=90), st.integers(1, 4), st.integers(1, 4))
def test_order_is_whole_and_deterministic(lengths: list[int], micro_batch: int, accumulation: int) -> None:
    def order(epoch: int) -> list[list[list[int]]]:
        return batches_of_epoch(
            lengths, micro_batch=micro_batch, accumulation=accumulation, seed=1, epoch=epoch
        )

    assert order(0) == order(0)
    assert sorted(i for step in order(1) for batch in step for i in batch) == list(range(len(lengths)))
    assert max(lengths) in {lengths[i] for batch in order(0)[0] for i in batch}


def _checked(data: str, model: Path | None, as_json: bool = False) -> str:
    console = Console(file=io.StringIO(), width=120, record=True)
    data_view.check(data, str(model) if model else None, console, as_json=as_json)
    return console.export_text()


ANSWERS = [{"question": f"ask {i}", "answer": "👩🏽 ʕ•ᴥ•ʔ \x1b[31mred \x1b]0;title\x07"} for i in range(20)]


@pytest.mark.parametrize("with_model", [False, True])
def test_check_counts_and_shows_whole_and_harmless_characters(
    smollm: Path, tmp_path: Path, with_model: bool
) -> None:
    file, model = _file(tmp_path, *map(json.dumps, ANSWERS)), smollm if with_model else None
    facts = json.loads(_checked(file, model, as_json=True))
    assert (facts["examples"], facts["examples_trained"], facts["held_out"]) == (20, 19, 1)
    text = _checked(file, model)
    assert "👩🏽 ʕ•ᴥ•ʔ" in text
    assert "�" not in text
    assert not {"\x1b", "\x07"} & set(text)
    assert ("examples trained on" in text) == with_model


@pytest.mark.parametrize("rows", [1, 20])
def test_check_refuses_what_training_refuses(tmp_path: Path, rows: int) -> None:
    with pytest.raises(DataError, match="at least 2 examples that differ"):
        _checked(_file(tmp_path, *[json.dumps(ANSWERS[0])] * rows), None)
