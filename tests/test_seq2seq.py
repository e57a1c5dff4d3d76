"""Encoder-decoders: pairs of source and target, their batches, and T5 trained end to end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lowvram.data.conversations import Conversation, Message, content_sha256, load_conversations
from lowvram.data.seq2seq import tokenize_pairs
from lowvram.data.split import split_held_out
from lowvram.engine.batch import collate_pairs
from lowvram.errors import DataError
from tests.seq2seq_model import rows, save_t5, tokenizer, write_rows


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5") / "tiny-t5")


def _conversation(*turns: tuple[Any, str], where: str = "d:1") -> Conversation:
    return Conversation(messages=tuple(Message(role=r, content=c) for r, c in turns), where=where)


def test_source_and_target_decode_to_the_row_and_end_with_the_end_token(tmp_path: Path) -> None:
    made = tokenizer()
    data = load_conversations(str(write_rows(tmp_path / "d.jsonl")))
    for example, row in zip(tokenize_pairs(data.conversations, made), rows(), strict=True):
        assert example.source_ids is not None
        assert made.decode(list(example.source_ids)) == row["question"] + "</s>"
        assert made.decode(list(example.input_ids)) == row["answer"] + "</s>"
        assert example.n_trained == len(example.input_ids)


def test_a_system_text_stands_above_the_question_and_earlier_turns_bring_roles() -> None:
    made = tokenizer()
    single = _conversation(("system", "old"), ("user", "red cat"), ("assistant", "cat red"))
    longer = _conversation(("user", "red"), ("assistant", "cat"), ("user", "blue"), ("assistant", "dog"))
    first, second = tokenize_pairs([single, longer], made)
    assert made.decode(list(first.source_ids or ())).split() == ["old", "red", "cat</s>"]
    text = made.decode(list(second.source_ids or ()))
    assert text.index("red") < text.index("cat") < text.index("blue")
    assert made.decode(list(second.input_ids)) == "dog</s>"


def test_a_control_token_in_a_question_does_not_end_it() -> None:
    """A Unigram has no other way to write it: the row is refused, as its end token would cut the question."""
    with pytest.raises(DataError, match=r"d:1: .*control token"):
        tokenize_pairs([_conversation(("user", "red </s> cat"), ("assistant", "dog"))], tokenizer())


@pytest.mark.parametrize("text", ["plain", "answer"])
def test_what_teaches_no_answer_is_refused_with_its_place(text: str) -> None:
    row = (
        Conversation(text="red cat", where="d:7")
        if text == "plain"
        else _conversation(("user", "red"), ("assistant", ""), where="d:7")
    )
    with pytest.raises(DataError, match="d:7"):
        tokenize_pairs([row], tokenizer())


def test_a_pair_without_a_question_or_with_a_call_for_an_answer_is_refused() -> None:
    with pytest.raises(DataError, match="d:1: nothing comes before the answer"):
        tokenize_pairs([_conversation(("assistant", "red"))], tokenizer())
    calls = [{"function": {"name": "f", "arguments": {}}}]
    calling = Message(role="assistant", content="let me look", extra={"tool_calls": calls})
    turns = (Message(role="user", content="red"), calling)
    with pytest.raises(DataError, match="d:1: the last turn calls a tool"):
        tokenize_pairs([Conversation(messages=turns, where="d:1")], tokenizer())


def test_of_a_row_without_tools_only_the_source_is_rendered() -> None:
    """A template that refuses the answer was never asked for it."""
    made = tokenizer()
    made.chat_template = (
        "{% if messages | length == 4 %}{{ raise_exception('no answer') }}{% endif %}"
        "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"
    )
    turns = [("user", "red"), ("assistant", "cat"), ("user", "blue"), ("assistant", "dog")]
    (example,) = tokenize_pairs([_conversation(*turns)], made)
    assert made.decode(list(example.input_ids)) == "dog</s>"


def test_batches_are_transformers_own(t5: Path) -> None:
    """Decoder inputs as T5 shifts labels, every target position trained, padding masked on both sides."""
    made, model = AutoTokenizer.from_pretrained(t5), AutoModelForSeq2SeqLM.from_pretrained(t5)
    turns = [("turn round: red cat", "cat red"), ("gold", "old old house gold")]
    examples = tokenize_pairs([_conversation(("user", q), ("assistant", a)) for q, a in turns], made)
    batch = collate_pairs(examples, made.pad_token_id, model.config.decoder_start_token_id)
    source = made([q for q, _ in turns], padding=True, return_tensors="pt")
    targets = made([a for _, a in turns], padding=True, return_tensors="pt")
    labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
    assert torch.equal(batch.source_ids, source.input_ids)
    assert torch.equal(batch.source_mask, source.attention_mask)
    kept = (labels != -100).flatten()
    shifted = model._shift_right(labels)  # its padding differs: there it reads the end token
    assert batch.input_ids.shape == shifted.shape
    assert torch.equal(batch.input_ids.flatten()[kept], shifted.flatten()[kept])
    assert torch.equal(batch.positions, kept.nonzero()[:, 0])
    assert torch.equal(batch.targets, labels.flatten()[kept])


def test_data_check_shows_sources_and_targets(t5: Path, tmp_path: Path, lowvram: Callable[..., Any]) -> None:
    page = tmp_path / "data.html"
    rows_file = write_rows(tmp_path / "d.jsonl")
    done = lowvram("data", "check", rows_file, "--model", t5, "--json", "--html", page)
    assert done.returncode == 0, done.stderr
    facts, made = json.loads(done.stdout), tokenizer()
    lengths = [[len(made(row[field])["input_ids"]) for row in rows()] for field in ("question", "answer")]
    assert facts["source_tokens_longest"] == max(lengths[0])
    assert facts["target_tokens_longest"] == max(lengths[1])
    assert facts["trained_share"] == pytest.approx(sum(lengths[1]) / sum(map(sum, lengths)), abs=0.02)
    marked = re.findall(r'<mark class="trained">(.*?)</mark>', page.read_text(encoding="utf-8"))
    assert all(any(row["answer"] in answer for row in rows()) for answer in marked)
    assert len(marked) >= 3


def test_t5_trains_end_to_end_and_its_adapter_loads_in_plain_peft(
    t5: Path, tmp_path: Path, lowvram: Callable[..., Any]
) -> None:
    """Through the command line: the loaded adapter and the merged model have the loss that was reported."""
    run = tmp_path / "run"
    flags = ("--steps", 60, "--rank", 16, "--learning-rate", "1e-2", "--precision", "fp32", "--batch", 8)
    done = lowvram("auto", "--model", t5, "--data", write_rows(tmp_path / "d.jsonl"), "-o", run, *flags)
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((run / "result.json").read_text())
    assert result["held_out_loss_after"] < 0.8 * result["held_out_loss_before"]
    plan = (run / "plan.yaml").read_text()
    assert "task_type: SEQ2SEQ_LM" in plan
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(t5), run / "adapter").eval()
    assert _held_out_loss(model, t5, tmp_path / "d.jsonl") == pytest.approx(
        result["held_out_loss_after"], rel=1e-4
    )
    merged = lowvram("merge", run)
    assert merged.returncode == 0, merged.stderr
    plain = AutoModelForSeq2SeqLM.from_pretrained(run / "merged").eval()
    assert _held_out_loss(plain, t5, tmp_path / "d.jsonl") == pytest.approx(
        result["held_out_loss_after"], rel=1e-3
    )


def _held_out_loss(model: Any, t5: Path, data: Path) -> float:
    """By transformers' own loss, one example at a time."""
    made = AutoTokenizer.from_pretrained(t5)
    digests = [bytes.fromhex(content_sha256(c)) for c in load_conversations(str(data)).conversations]
    _, held_out = split_held_out(np.array(digests, dtype="S32"), 0.05, str(data))
    total, count = 0.0, 0
    for index in held_out:
        row = rows()[index]
        labels = made(row["answer"], return_tensors="pt").input_ids
        with torch.no_grad():
            loss = model(**made(row["question"], return_tensors="pt"), labels=labels).loss
        total, count = total + float(loss) * labels.numel(), count + labels.numel()
    return total / count
