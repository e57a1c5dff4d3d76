"""Prepared rows: the same as in memory, from the cache as from the file, in one process as in many."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowvram.data import chunk_work, prepared, text_files, work_force
from lowvram.data.conversations import load_conversations
from lowvram.data.prepared import prepare_rows
from lowvram.data.row_store import RowStore
from lowvram.data.shapes import Reading
from lowvram.data.split import split_held_out
from lowvram.data.tokens import Example, tokenize
from lowvram.engine.source import ModelSource
from lowvram.errors import DataError, DoesNotFitError
from lowvram.training.data import prepare
from tests.conftest import GSM8K

SKIP = Reading(skip_bad=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm: Path) -> Path:
    """An empty one, after the real model was found in the user's."""
    assert smollm.is_dir()
    folder = tmp_path / "cache"
    monkeypatch.setenv("LOWVRAM_CACHE", str(folder))
    return folder / "data"


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """A tokenizer of some words, with ChatML."""
    vocabulary = {word: at for at, word in enumerate(["?", "<s>", "</s>", "user", "assistant", "row"])}
    whole = Tokenizer(models.WordLevel(vocabulary | {str(n): 6 + n for n in range(1000)}, unk_token="?"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=whole, eos_token="</s>", unk_token="?", additional_special_tokens=["<s>"]
    )
    made.chat_template = (
        "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
    )
    return made


def _file(tmp_path: Path, count: int, bad: dict[int, str] | None = None) -> str:
    """Question and answer on each line but those of `bad`."""
    path = tmp_path / "train.jsonl"
    rows = (
        (bad or {}).get(n, json.dumps({"question": f"row {n}", "answer": f"row {n * 7 % 1000}"}))
        for n in range(1, count + 1)
    )
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From the second chunk on, two worker processes; how many chunks they were given."""
    given: list[int] = []
    together = work_force._together

    def counted(work: Any, numbered: Any, *rest: Any) -> None:
        given.append(len(numbered))
        together(work, numbered, *rest)

    monkeypatch.setattr(text_files, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(work_force, "_TRIAL_S", 0.0)
    monkeypatch.setattr(work_force, "_WORTH_S", 0.0)
    monkeypatch.setattr(work_force, "_cores", lambda: 2)
    monkeypatch.setattr(work_force, "_together", counted)
    return given


def _examples(store: RowStore) -> list[Example]:
    return list(store.select(range(len(store))))


def test_gsm8k_is_what_it_was_in_memory(smollm: Path) -> None:
    """Tokens, masks, places, hash and held-out rows of the way that held everything in memory."""
    source = ModelSource(str(smollm))
    data = load_conversations(str(GSM8K))
    expected = tokenize(data.conversations, source.tokenizer)
    got = prepare(str(GSM8K), source)
    assert got.stats.sha256 == data.sha256
    assert (got.stats.shape, got.stats.reading) == ("question-answer", Reading(shape="question-answer"))
    assert list(got.train) == [expected[i] for i in got.train.indices]
    assert list(got.held_out) == [expected[i] for i in got.held_out.indices]
    assert got.train.lengths.tolist() == [len(e) for e in got.train]
    assert got.train.n_trained.tolist() == [e.n_trained for e in got.train]
    assert got.train.answer_starts.tolist() == [e.trained.index(1) for e in got.train]
    assert got.stats.n_tokens == sum(map(len, got.train))
    assert len(got.held_out) == 64


def test_cut_is_that_of_each_example(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    store = prepare_rows(_file(tmp_path, 30), Reading(), words)
    whole, seq_len = store.select(range(10, 30)), 8
    short = whole.cut(seq_len)
    assert [e.where.rsplit(":")[-1] for e in short] == [str(n) for n in range(11, 31)]
    assert max(map(len, short)) == seq_len < max(map(len, whole))
    assert short.lengths.tolist() == [len(e) for e in short]
    assert list(short[3:5]) == [short[3], short[4]]
    assert len(whole.cut(int(whole.answer_starts.min()))) == 0


def test_many_processes_make_the_same(
    words: PreTrainedTokenizerFast,
    tmp_path: Path,
    cache: Path,
    many: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, told = _file(tmp_path, 900), []
    monkeypatch.setattr(work_force, "_LOOK_S", 0.001)
    store = prepare_rows(name, Reading(), words, lambda done, left: told.append((done, left)))
    assert many[0] > 5
    data = load_conversations(name)
    assert _examples(store) == tokenize(data.conversations, words)
    assert store.sha256() == data.sha256
    assert all(0 <= done <= 1 and left >= 0 for done, left in told)
    assert told == sorted(told)
    (entry,) = cache.iterdir()
    assert {file.suffix for file in entry.iterdir()} == {".arrow", ".json"}


@pytest.mark.skipif(sys.platform != "linux", reason="only a forked process sees the patch")
def test_a_killed_worker_is_no_traceback(
    words: PreTrainedTokenizerFast,
    tmp_path: Path,
    cache: Path,
    many: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent, table = os.getpid(), chunk_work.ChunkWork.table

    def killed(self: Any, chunk: Any) -> Any:
        if os.getpid() != parent:
            os._exit(9)
        return table(self, chunk)

    monkeypatch.setattr(chunk_work.ChunkWork, "table", killed)
    with pytest.raises(DoesNotFitError, match="was killed"):
        prepare_rows(_file(tmp_path, 900), Reading(), words)
    assert many
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("together", [False, True])
def test_the_first_bad_row_is_the_one_that_is_told(
    words: PreTrainedTokenizerFast,
    tmp_path: Path,
    cache: Path,
    together: bool,
    request: pytest.FixtureRequest,
) -> None:
    if together:
        request.getfixturevalue("many")
    name = _file(tmp_path, 900, {123: '{"text": "x"}', 124: "{", 880: '{"question": "", "answer": "a"}'})
    with pytest.raises(DataError, match=r":123: has the shape 'text', but .*:1 has the shape 'question-ans"):
        prepare_rows(name, Reading(), words)
    assert list(cache.iterdir()) == []  # nothing half done is left
    store = prepare_rows(name, SKIP, words)
    assert [line.split(": ")[0][-4:] for line in store.problems()] == [":123", ":124", ":880"]
    assert len(store) == 897
    assert [store.place(i)[-4:] for i in (121, 122)] == [":122", ":125"]
    with pytest.raises(DataError, match=":123: ") as caught:  # also from what is remembered
        prepare_rows(name, Reading(), words)
    assert "--skip-bad" in caught.value.remedy


def test_what_the_template_refuses_is_a_bad_row(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """One row among many, found by halving."""
    strict = PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        eos_token="</s>",
        unk_token="?",
        additional_special_tokens=["<s>"],
    )
    refuse = "{% if '13' in messages[0]['content'] %}{{ raise_exception('unlucky') }}{% endif %}"
    strict.chat_template = refuse + str(words.chat_template)
    name = _file(tmp_path, 20)
    store = prepare_rows(name, SKIP, strict)
    (problem,) = store.problems()
    assert problem.startswith(f"{name}:13: the model's chat template refuses")
    assert len(store) == 19
    with pytest.raises(DataError, match="unlucky"):
        prepare_rows(name, Reading(), strict)


def test_a_line_tells_how_far_it_is() -> None:
    line = work_force.progress_line("/some/where/train.jsonl", 0.25, 75)
    assert line == "preparing train.jsonl " + "━" * 6 + "╌" * 18 + " 25 %, 1 min 15 s left"


def _counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a chunk was worked on."""
    calls: list[int] = []
    table = chunk_work.ChunkWork.table

    def counted(self: Any, chunk: Any) -> Any:
        calls.append(1)
        return table(self, chunk)

    monkeypatch.setattr(chunk_work.ChunkWork, "table", counted)
    return calls


def test_it_is_remembered_by_content_template_and_reading(
    words: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, name = _counting(monkeypatch), _file(tmp_path, 20)
    first = _examples(prepare_rows(name, Reading(), words))
    assert _examples(prepare_rows(name, Reading(), words)) == first
    assert _examples(prepare_rows(name, SKIP, words)) == first
    renamed = tmp_path / "other.jsonl"
    Path(name).rename(renamed)
    assert prepare_rows(str(renamed), Reading(), words).place(4) == f"{renamed}:5"
    assert len(calls) == 1
    told = Reading(shape="question-answer")
    prepare_rows(str(renamed), told, words)
    monkeypatch.setattr(words, "chat_template", str(words.chat_template).replace("'</s>'", "' </s>'"))
    prepare_rows(str(renamed), Reading(), words)
    monkeypatch.setattr(prepared, "_code", lambda: "another version")
    prepare_rows(str(renamed), Reading(), words)
    renamed.write_text(renamed.read_text() + '{"question": "q", "answer": "a"}\n')
    assert len(prepare_rows(str(renamed), Reading(), words)) == 21
    assert len(calls) == 5


def test_a_list_within_an_object_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my rows.json"
    path.write_text(json.dumps({"version": 1, "data": [{"question": "q", "answer": "a"}]}))
    with pytest.raises(DataError, match=r"rows\.json:1: an object whose field 'data' is the list") as caught:
        prepare_rows(str(path), Reading(), None)
    assert caught.value.remedy.endswith(f"""jq '."data"' '{path}' > rows.json""")
    path.rename("rows.json")  # the shell would empty it before jq reads it
    with pytest.raises(DataError) as caught:
        prepare_rows("rows.json", Reading(), None)
    assert caught.value.remedy.endswith("rows.json > rows-2.json")


@pytest.mark.parametrize("form", ["[{row}]", "{row}\n{row}\n"])
def test_a_list_within_one_of_many_objects_is_not_said_to_be_the_file(tmp_path: Path, form: str) -> None:
    """The command would fail on an array, and make of several lines as many lists."""
    row = json.dumps({"id": 1, "data": [{"question": "q", "answer": "a"}]})
    path = tmp_path / "a.json"
    path.write_text(form.replace("{row}", row))
    with pytest.raises(DataError) as caught:
        prepare_rows(str(path), Reading(), None)
    assert "jq" not in caught.value.remedy


def test_bad_rows_are_not_remembered_under_another_name(
    words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    name, renamed = _file(tmp_path, 20, {3: "{"}), tmp_path / "other.jsonl"
    prepare_rows(name, SKIP, words)
    Path(name).rename(renamed)
    assert next(prepare_rows(str(renamed), SKIP, words).problems()).startswith(f"{renamed}:3: ")


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        lambda entry: _flip(next(entry.glob("*.arrow"))),
        lambda entry: os.truncate(next(entry.glob("*.arrow")), 100),
        lambda entry: next(entry.glob("*.arrow")).unlink(),
        lambda entry: (entry / "entry.json").unlink(),
        lambda entry: (entry / "entry.json").write_text("{"),
        lambda entry: (entry / "z.arrow").write_bytes(b"more"),
    ],
    ids=["bit", "truncated", "missing", "no entry", "half an entry", "one more"],
)
def test_a_harmed_entry_is_made_anew(
    words: PreTrainedTokenizerFast, tmp_path: Path, cache: Path, harm: Callable[[Path], Any]
) -> None:
    name = _file(tmp_path, 20)
    first = _examples(prepare_rows(name, Reading(), words))
    (entry,) = cache.iterdir()
    harm(entry)
    assert _examples(prepare_rows(name, Reading(), words)) == first
    assert [f.name for f in cache.iterdir()] == [entry.name]


def test_the_cache_is_bounded_and_cleared_of_what_was_killed(
    words: PreTrainedTokenizerFast, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_rows(_file(tmp_path, 20), Reading(), words)
    (old,) = cache.iterdir()
    for name, age in ((".making-dead", 2 * 24 * 3600), (".making-alive", 60)):
        (cache / name).mkdir()
        os.utime(cache / name, times=(os.path.getmtime(old) - age,) * 2)
    prepare_rows(_file(tmp_path, 21), Reading(), words)
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setattr(prepared, "_MOST_KEPT_BYTES", 100)
    prepare_rows(_file(tmp_path, 22), Reading(), words)
    assert not old.exists()
    assert sorted(f.name[0] for f in cache.iterdir() if f.name[0] == ".") == ["."]
    assert len(list(cache.iterdir())) == 2


def test_without_a_tokenizer_rows_are_checked_only(tmp_path: Path) -> None:
    store = prepare_rows(_file(tmp_path, 20, {3: "{"}), SKIP, None)
    assert (len(store), store.lengths.sum(), len(store.bad_rows)) == (19, 0, 1)
    assert store.characters.tolist() == [len(f"row {n}row {n * 7 % 1000}") for n in range(1, 21) if n != 3]
    assert len(np.unique(store.digests)) == 19
    assert len(split_held_out(store.digests)[1]) == 1
