"""A run on rows that need telling: shape, names and skipped rows go from the flags to the plan and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lowvram.planner.plan import Plan
from tests.test_pipeline import SHORT, TINY, Run, run

__all__ = ["run"]  # a fixture
TOLD = ("--fields", "question=ask,answer=reply", "--skip-bad")


@pytest.fixture(scope="module")
def model(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    config = LlamaConfig(**TINY, num_hidden_layers=2, vocab_size=len(tokenizer), tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """28 good rows of a shape that nobody would find; lines 3 and 30 are bad."""
    rows = [json.dumps({"ask": f"What is {i} + 1?", "reply": str(i + 1), "by": "me"}) for i in range(30)]
    rows[2], rows[29] = "{", json.dumps({"ask": "What?", "reply": ""})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{row}\n" for row in rows))
    return file


def test_what_was_told_about_the_data_is_in_the_plan_and_obeyed_again(
    model: Path, data: Path, tmp_path: Path, run: Run
) -> None:
    given = ("--model", model, "--data", data, *SHORT)
    code, out, err = run("auto", *given, *TOLD, "-o", tmp_path / "first")
    assert code == 0, err
    assert "2 rows are skipped; which and why" in out
    skipped = (tmp_path / "first" / "skipped_rows.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in skipped] == [f"{data}:3", f"{data}:30"]
    plan = Plan.from_yaml(tmp_path / "first" / "plan.yaml")
    assert plan.reading.model_dump() == {
        "shape": "question-answer",
        "fields": {"question": "ask", "answer": "reply"},
        "split": None,
        "skip_bad": True,
    }
    said = "data of the shape question-answer (as you asked), fields not read: by, 2 rows skipped"
    assert [reason for reason in plan.reasons if reason.startswith(said)]
    assert "data of the shape question-answer" in out
    code, _, err = run("train", tmp_path / "first" / "plan.yaml", "-o", tmp_path / "second")
    assert code == 0, err
    assert (tmp_path / "second" / "skipped_rows.txt").read_text().splitlines() == skipped
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("first", "second")]
    assert results[0]["held_out_loss_after"] == results[1]["held_out_loss_after"]
    data.write_text(data.read_text().replace("What is 5", "What is 6"))
    code, _, err = run("train", tmp_path / "first" / "plan.yaml", "-o", tmp_path / "third")
    assert code == 2
    assert "its content hash differs" in err


FORGETS = "{{ m.content if loop.last or m.role == 'user' else m.content.split('</think>')[-1] }}"
CHATML = f"{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{FORGETS}<|im_end|>\n{{% endfor %}}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize("command", [("auto", "--dry-run"), ("plan", "--vram", "8GB")])
def test_untrained_turns_are_told_in_the_plan(
    model: Path, tmp_path: Path, run: Run, command: tuple[str, ...]
) -> None:
    """Of a template that removes old thoughts, as Qwen3's: 19 of 20 rows are trained on, each with one."""
    forgetful = shutil.copytree(model, tmp_path / "forgetful")
    (forgetful / "chat_template.jinja").write_text(CHATML + ASKS)
    exchange = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>hm</think>1"}]
    rows = [{"messages": [*exchange, {"role": "user", "content": f"{i}"}, exchange[1]]} for i in range(20)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    code, out, err = run(*command, "--model", forgetful, "--data", data)
    assert code == 0, err
    assert "19 assistant turns untrained, which the chat template rewrites" in " ".join(
        out.replace("│", " ").split()
    )


def test_unreadable_rows_are_refused_before_anything_is_planned(model: Path, data: Path, run: Run) -> None:
    given = ("plan", "--model", model, "--data", data, "--vram", "8GB")
    code, _, err = run(*given)
    assert code == 5
    assert f"{data}:1: no known shape; its fields are ask, reply, by." in err
    code, _, err = run(*given, *TOLD[:2])
    assert code == 5
    assert f"{data}:3: not JSON" in err


@pytest.mark.parametrize("flags", [TOLD, ("--data-format", "text"), ("--split", "test")])
def test_how_to_read_without_data_is_refused(model: Path, run: Run, flags: tuple[str, ...]) -> None:
    code, _, err = run("plan", "--model", model, "--vram", "8GB", *flags)
    assert code == 2
    assert "no data to read" in err


def test_check_on_the_command_line(data: Path, model: Path, tmp_path: Path, run: Run) -> None:
    told = ("data", "check", data, *TOLD[:2], "--model", model)
    html = tmp_path / "page.html"
    code, out, err = run(*told, "--json", "--seq-len", "32", "--html", html)
    assert code == 5
    assert "In all 2 of 30 rows cannot be used" in err
    assert json.loads(out)["bad_rows"] == 2
    assert "Rows that cannot be used" in html.read_text()
    assert run(*told, "--skip-bad")[0] == 0
