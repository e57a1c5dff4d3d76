"""Memory of `data check`: flat in the bytes of a source, some bytes for each of its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts pages in /proc")

LONG_WORD = "word" * 20  # long words are few tokens, and soon counted

WATCHED = """
import io, sys, threading
from pathlib import Path
from rich.console import Console
from lowvram import data_report, data_view

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def peak_of_check(name, model):
    most, stop = anonymous(), threading.Event()
    def watch():
        nonlocal most
        while not stop.wait(0.002):
            most = max(most, anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    data_view.check(name, model, Console(file=io.StringIO()))
    stop.set()
    watcher.join()
    return most
"""

FILES = """
small, large, model = sys.argv[1:]
peak_of_check(small, model)
print(*(peak_of_check(name, model) for name in (small, large)))
"""

# Rows are prepared once and repeated, each copy with content of its own: a million would take minutes.
ROWS = """
import numpy as np, pyarrow as pa
from lowvram.data.chunk_work import SCHEMA
from lowvram.data.prepared import prepare_rows
from lowvram.data.row_store import RowStore
from lowvram.data.shapes import Reading

name, model, *counts = sys.argv[1:]
tokenizer = data_view._tokenizer(model)[0]
made = prepare_rows(name, Reading(), tokenizer)
draw = np.random.default_rng(0)

def repeated(count):
    file = Path(name).with_name(f"{count}.arrow")
    at = SCHEMA.names.index("digest")
    with file.open("wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for _ in range(count // len(made)):
            content = pa.py_buffer(draw.bytes(32 * len(made)))
            own = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(made), [None, content])
            writer.write_table(made._table.set_column(at, SCHEMA.field(at), own.cast(pa.binary())))
    return RowStore(file.parent, made.entry.model_copy(update={"files": {file.name: ""}}))

peaks = []
for count in map(int, counts):
    data_report.prepare_rows = lambda *_, **__: repeated(count)
    peaks.append(peak_of_check(name, model))
print(*peaks)
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A tokenizer of some words."""
    whole = Tokenizer(models.WordLevel({"?": 0, "</s>": 1, "word": 2}, unk_token="?"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="</s>", unk_token="?").save_pretrained(
        tmp_path / "model"
    )
    return str(tmp_path / "model")


def _file(tmp_path: Path, count: int, words: int) -> str:
    path = tmp_path / f"{count}.jsonl"
    with path.open("w") as file:
        for n in range(count):
            file.write(json.dumps({"text": f"{n} " + f"{LONG_WORD} " * words}) + "\n")
    return str(path)


def _peaks(tmp_path: Path, script: str, *args: str) -> tuple[int, int]:
    """Most anonymous bytes while the smaller and while the larger source is checked."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED + script, *args],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"LOWVRAM_CACHE": str(tmp_path / "cache")},
    )
    small, large = map(int, done.stdout.split())
    return small, large


def test_large_files_take_the_memory_of_small_ones(tmp_path: Path, model: str) -> None:
    """48 MB of rows in 24 MB: a chunk of 0.5 MB as objects and as tokens, and its table."""
    files = _file(tmp_path, 300, 50), _file(tmp_path, 12_000, 50)
    assert Path(files[1]).stat().st_size > 48e6
    small, large = _peaks(tmp_path, FILES, *files, model)
    assert large - small < 24e6


def test_a_row_takes_some_bytes(tmp_path: Path, model: str) -> None:
    """Measured 35, of which 4 for its place and 8 for a digest, twice while sorted; once it was 178."""
    few, many = 20_000, 420_000
    small, large = _peaks(tmp_path, ROWS, _file(tmp_path, 2000, 3), model, str(few), str(many))
    assert (large - small) / (many - few) < 60
