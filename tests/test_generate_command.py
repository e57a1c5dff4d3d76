"""`lowvram generate`: rows in, JSON lines out, whatever the batch, and no file that is not whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from lowvram.answer_file import AnswerFile, partial_of
from lowvram.answering import find
from lowvram.data.conversations import Message
from lowvram.data.prompting import prompt_ids
from lowvram.engine.generate import Answers
from lowvram.engine.sampling import Sampling
from lowvram.errors import ConfigError, DataError, DoesNotFitError
from lowvram.generate_command import Settings, asked, hash_of
from tests import chat_home as home
from tests import tiny_runs
from tests.chat_home import Reference
from tests.test_pipeline import TINY
from tests.tiny_adapters import alone, generated, save_adapter
from tests.tiny_runs import ASKED, Cli, write_rows

byte_model, chat_home, command = tiny_runs.byte_model, home.chat_home, tiny_runs.command
pytestmark = pytest.mark.usefixtures("one_thread")
N = 12
FP32 = ("--precision", "fp32")
ROWS: list[dict[str, Any]] = [
    {"prompt": "hi"},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 1 + 1?"}]},
    {"prompt": "a longer question, which the others are padded to"},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
    },
    {"prompt": "ho", "id": 7},
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def _turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    return [(message["role"], message["content"]) for message in messages]


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("batch", ["1", "3", None])
def test_every_row_gets_the_adapter_s_answer(
    chat_home: Path,
    rows: Path,
    tmp_path: Path,
    command: Cli,
    batch: str | None,
) -> None:
    """As alone in plain peft; the rows come back in their order, with what was asked."""
    output = tmp_path / "answers.jsonl"
    given = ("--batch", batch) if batch else ()
    code, _, err = command(
        "generate", chat_home / "sql", "-i", rows, "-o", output, "--max-new-tokens", N, *FP32, *given
    )
    assert code == 0, err
    assert f"in each of {batch or 5} rows" in err or batch == "1"
    reference = Reference(chat_home, "sql")
    answers = [reference.to(_turns(row), N) for row in ROWS]
    assert _read(output) == [
        row | {"answer": a.text, "stopped": a.stopped, "n_tokens": a.n_tokens}
        for row, a in zip(ROWS, answers, strict=True)
    ]
    assert len({a.text for a in answers}) > 1


def test_prompts_go_to_stdout_with_base_adapter_and_seed_chosen(
    chat_home: Path,
    command: Cli,
) -> None:
    asked = ("-p", "hi", "-p", "ho", "--max-new-tokens", N, "--system", "be brief", *FP32)
    base, sql, poet = (Reference(chat_home, name) for name in (None, "sql", "poet"))
    hot = ("--temperature", "1.5", "--top-p", "0.9", "--seed", "7")
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=7)
    for flags, reference, how in (
        (("--base-only",), base, Sampling()),
        ((), sql, Sampling()),
        (("--adapter", chat_home / "poet"), poet, Sampling()),
        (hot, sql, sampling),
    ):
        code, out, err = command("generate", chat_home / "sql", *asked, *flags)
        assert code == 0, err
        wanted = [
            reference.to([("system", "be brief"), ("user", prompt)], N, how, row)
            for row, prompt in enumerate(("hi", "ho"))
        ]
        lines = [json.loads(line) for line in out.replace("} {", "}\n{").splitlines()]
        assert [" ".join(line["answer"].split()) for line in lines] == [
            " ".join(answer.text.split()) for answer in wanted
        ]


def test_an_adapter_on_the_embedding_answers_as_in_plain_peft(
    chat_home: Path, tmp_path: Path, command: Cli
) -> None:
    """As peft saves it: with the base's own embedding beside."""
    folder = save_adapter(chat_home / "base", tmp_path / "ends", 5, target_modules=["embed_tokens", "q_proj"])
    AutoTokenizer.from_pretrained(chat_home / "base").save_pretrained(folder)
    code, out, err = command("generate", folder, "-p", "hi", "--max-new-tokens", N, *FP32)
    assert code == 0, err
    assert "tie_word_embeddings" not in err  # peft's warning, which is of training and merging
    ids = prompt_ids([Message(role="user", content="hi")], AutoTokenizer.from_pretrained(folder))
    wanted = generated(alone(chat_home / "base", folder), ids, N, do_sample=False)
    assert json.loads(out)["n_tokens"] == len(wanted)
    decoded = AutoTokenizer.from_pretrained(folder).decode(wanted, skip_special_tokens=True)
    assert json.loads(out)["answer"].split() == decoded.split()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question": "hi"}', "rows.jsonl:2: a row needs either 'prompt' or 'messages'"),
        ('{"prompt": ""}', "rows.jsonl:2: the field 'prompt' is empty"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "rows.jsonl:2: the last turn is the"),
        ('{"prompt": "hi"', "rows.jsonl:2"),
        (json.dumps({"prompt": "long " * 800}), "rows.jsonl:2: "),
    ],
    ids=["fields", "empty", "answered", "no JSON", "too long"],
)
def test_a_bad_row_is_named_before_anything_is_loaded(
    chat_home: Path,
    rows: Path,
    command: Cli,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    says: str,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lowvram.engine.model.load", never)
    rows.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    code, out, err = command("generate", chat_home / "sql", "-i", rows)
    assert (code, out) == (5, ""), err
    assert says in err


def test_refusals(chat_home: Path, rows: Path, tmp_path: Path, command: Cli) -> None:
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    for flags, says in (
        (("-i", rows, "-o", there), "exists already"),
        ((), "Nothing is asked"),
        (("-p", "hi", "--temperature", "-1"), "--temperature -1.0"),
        (("-p", "hi", "--top-p", "0"), "--top-p 0.0"),
        (("-p", "hi", "--precision", "int3"), "no precision 'int3'"),
        (("-p", "hi", "--adapter", tmp_path), "holds no finished adapter"),
        (("-p", "hi", "--base", tmp_path / "gone"), "no folder"),
        (("-p", "hi", "--base", ""), "--base is empty"),
        (("-p", "hi", "--base-only", "--adapter", chat_home / "poet"), "--base-only leaves out"),
    ):
        code, out, err = command("generate", chat_home / "sql", *flags)
        assert (code, out, says in err) == (2, "", True), err
    assert there.read_text() == "mine"


def test_a_batch_is_no_larger_than_what_is_asked(chat_home: Path, command: Cli) -> None:
    code, _, err = command("generate", chat_home / "sql", "-p", "hi", "--batch", 1_000_000, *FP32)
    assert code == 0, err
    assert "rows" not in err.partition("answering")[0]


def test_a_merged_folder_answers_as_its_adapter(
    chat_home: Path,
    tmp_path: Path,
    command: Cli,
) -> None:
    assert command("merge", chat_home / "poet", "-o", tmp_path / "merged")[0] == 0
    asked = ("-p", "hi", "--max-new-tokens", N, *FP32)
    code, merged, err = command("generate", tmp_path / "merged", *asked)
    assert code == 0, err
    assert merged == command("generate", chat_home / "poet", *asked)[1]
    assert merged != command("generate", chat_home / "base", *asked)[1]


def test_memory_that_runs_out_is_said_with_the_prediction(
    chat_home: Path, command: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch says it on a card that another program has filled meanwhile."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Answers, "to", full)
    code, out, err = command("generate", chat_home / "sql", "-p", "hi")
    assert (code, out) == (4, ""), err
    assert "ran out of memory" in err
    assert "were predicted" in err


def _stop_at_call(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """A real signal before the batch of this number; the list has one entry a batch that was begun."""
    whole, calls = Answers.to, list[int]()

    def interrupted(self: Answers, *given: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *given)

    monkeypatch.setattr(Answers, "to", interrupted)
    return calls


@pytest.mark.parametrize("is_cut", [False, True], ids=["stopped", "killed while it wrote"])
def test_stopped_in_the_middle_it_goes_on_from_there(
    chat_home: Path,
    rows: Path,
    tmp_path: Path,
    command: Cli,
    monkeypatch: pytest.MonkeyPatch,
    is_cut: bool,
) -> None:
    """The same command, of any batch, answers what is missing; another one does not mix with it."""
    output, partial = tmp_path / "my a.jsonl", tmp_path / "my a.jsonl.partial"
    given = ("generate", chat_home / "sql", "-i", rows, "-o", output, "--max-new-tokens", N, *FP32)
    calls = _stop_at_call(monkeypatch, 3)
    code, _, err = command(*given, "--batch", "1")
    assert (code, len(calls)) == (143, 3), err
    assert f"2 of 5 are, in '{partial}'" in err
    assert f"Go on with them: lowvram generate {chat_home / 'sql'}" in err
    assert f"-o '{output}'" in err
    assert not output.exists()
    if is_cut:
        partial.write_bytes(partial.read_bytes()[:-5])
    code, _, err = command(*given, "--temperature", "1")
    assert (code, "keeps answers of another command" in err) == (2, True), err
    calls.clear()
    code, _, err = command(*given, "--batch", "1")
    assert (code, len(calls)) == (143, 3), err
    calls = _stop_at_call(monkeypatch, 0)
    code, _, err = command(*given, "--batch", "2")
    assert (code, len(calls)) == (0, 1), err
    assert sorted(file.name for file in tmp_path.iterdir()) == [output.name, rows.name]
    code, _, err = command(*given[:5], tmp_path / "b.jsonl", *given[6:])
    assert code == 0, err
    assert output.read_text() == (tmp_path / "b.jsonl").read_text()


def test_a_file_that_cannot_be_made_is_refused_before_the_model_is_loaded(
    chat_home: Path, tmp_path: Path, command: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.engine.model.load", None)
    for name in ("a" * 300, "no/such/folder"):
        code, _, err = command("generate", chat_home / "sql", "-p", "hi", "-o", tmp_path / name)
        assert (code, "What to do" in err) == (2, True), err
    code, _, err = command("generate", chat_home / "sql", "-p", "hi", "-o", tmp_path / ("a" * 252))
    assert (code, "File name too long" in err) == (2, True), err
    assert list(tmp_path.iterdir()) == []


def test_answers_leave_memory_as_they_come(tmp_path: Path) -> None:
    """Each is on disk before the next is asked for, and the whole file has them in order."""
    path = tmp_path / "a.jsonl"
    with AnswerFile.open(path, "the same") as file:
        for number in (2, 0, 1):
            file.add(number, json.dumps({"id": number, "answer": "a, b"}) + "\n")
            assert f'"id": {number}' in partial_of(path).read_text().splitlines()[-1]
        with pytest.raises(ConfigError, match="Another process"), AnswerFile.open(path, "the same"):
            pass
        file.finish()
    assert _read(path) == [{"id": number, "answer": "a, b"} for number in range(3)]
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def _add(path: Path, *answers: str) -> None:
    with AnswerFile.open(path, "the same") as file:
        for answer in answers:
            file.add(len(file), json.dumps({"answer": answer}) + "\n")


@pytest.mark.skipif(os.name == "nt", reason="a limit as on POSIX")
def test_a_full_disk_is_said_and_costs_no_answer(tmp_path: Path) -> None:
    """Closing the file writes once more, and fails once more; that error says nothing new."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(DoesNotFitError, match="it keeps 1 answers"):
            _add(tmp_path / "a.jsonl", "a", "b" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with AnswerFile.open(tmp_path / "a.jsonl", "the same") as file:
        assert (0 in file, 1 in file) == (True, False)


def test_answers_of_two_models_do_not_mix(tmp_path: Path, chat_home: Path) -> None:
    """Neither of two precisions, which follow from free memory, nor of one adapter at two scales."""
    with AnswerFile.open(tmp_path / "a.jsonl", "the same") as file:
        file.computed_in("nf4")
        file.add(0, '{"answer": "a"}\n')
    for _ in range(2):
        with AnswerFile.open(tmp_path / "a.jsonl", "the same") as file:
            file.computed_in("nf4")
            assert 0 in file
            with pytest.raises(ConfigError, match="keeps 1 answers of a base in nf4; now bf16 is planned"):
                file.computed_in("bf16")
    run = Path(shutil.copytree(chat_home / "sql", tmp_path / "sql"))
    settings = Settings(Sampling(), N)
    before = hash_of(find(str(run)), [], settings)
    assert hash_of(find(str(run)), [], settings) == before
    config = next(run.rglob("adapter_config.json"))
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 99}))
    assert hash_of(find(str(run)), [], settings) != before


def _finish(path: Path, meanwhile: str = "") -> None:
    with AnswerFile.open(path, "the same") as file:
        if meanwhile:
            path.write_text(meanwhile)
        file.finish()


def test_what_has_come_to_be_at_the_output_costs_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    _add(path, "a")
    with pytest.raises(ConfigError, match="has come to be meanwhile; the 1 answers are in") as refused:
        _finish(path, "another program's")
    assert "Move it away, then type the same command again" in refused.value.remedy
    assert path.read_text() == "another program's"
    path.unlink()
    _finish(path)
    assert _read(path) == [{"answer": "a"}]


def test_bytes_that_are_no_text_are_refused_before_a_model_answers(tmp_path: Path) -> None:
    """As Python has them of a command line: half a pair each. A file's are refused where it is read."""
    for prompts, system in ((["a\udcff"], ""), (["a"], "\udcff")):
        with pytest.raises(DataError, match=r"prompt .: it has '\\udcff', which is no text"):
            asked(prompts, None, system, None)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "id": "\ud83d"}) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: half of a"):
        asked((), str(file), "", None)


@pytest.mark.parametrize(
    "flags",
    [("--dora",), ("--bias", "all"), ("--init", "lora_ga"), ()],
    ids=["dora", "bias", "lora_ga", "plain"],
)
def test_what_a_run_leaves_answers_as_in_plain_peft(
    chat_home: Path, tmp_path: Path, command: Cli, flags: tuple[str, ...]
) -> None:
    """A Qwen2, whose q, k and v have biases, trained by the command line in the precision of its plan."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**TINY, num_hidden_layers=2, vocab_size=257))
    for parameter in model.parameters():
        parameter.data.mul_(3)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(chat_home / "base").save_pretrained(tmp_path / "base")
    data, run = write_rows(tmp_path / "rows.jsonl", range(20)), tmp_path / "run"
    trained = ("auto", "--model", tmp_path / "base", "--data", data, *ASKED, "--precision", "fp32")
    code, _, err = command(*trained, "--steps", "3", "--learning-rate", "5e-2", *flags, "-o", run)
    assert code == 0, err
    code, _, err = command("generate", run, "-p", "hi", "--max-new-tokens", N, "-o", tmp_path / "a.jsonl")
    assert code == 0, err
    assert "precision: as trained" in err
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    ids = prompt_ids([Message(role="user", content="hi")], tokenizer)
    wanted = generated(alone(tmp_path / "base", run / "adapter"), ids, N, do_sample=False)
    (answer,) = _read(tmp_path / "a.jsonl")
    end = tokenizer.eos_token_id
    assert answer["answer"] == tokenizer.decode([token for token in wanted if token != end])
    assert answer["n_tokens"] == len(wanted)
    without = generated(alone(tmp_path / "base", None), ids, N, do_sample=False)
    assert wanted != without


@pytest.mark.slow
def test_a_real_model_answers_in_4_bits(smollm: Path, command: Cli, tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct, in one batch of three prompts of different lengths."""
    questions = [
        "What is the capital of France?",
        "Say hello.",
        "How many legs does a spider have? Be brief.",
    ]
    output = tmp_path / "answers.jsonl"
    prompts = [part for question in questions for part in ("-p", question)]
    code, _, err = command(
        "generate", smollm, *prompts, "-o", output, "--max-new-tokens", 24, "--precision", "nf4"
    )
    assert code == 0, err
    assert "nf4 base" in err
    answers = _read(output)
    assert [row["prompt"] for row in answers] == questions
    assert "Paris" in answers[0]["answer"]
    assert any(row["stopped"] for row in answers)
