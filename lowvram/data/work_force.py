"""Work force: all chunks of a source, in this process while that is quick, on all cores when it is not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from lowvram.data.chunk_work import SCHEMA, ChunkWork, chunks_done, clear_marks
from lowvram.data.text_files import Chunk
from lowvram.errors import DoesNotFitError
from lowvram.units import format_seconds

Progress = Callable[[float, float], None]  # share done, seconds left

_BAR_SIGNS = 24
_TRIAL_S = 1.0  # of work before it is judged
_WORTH_S = 4.0  # left for one process: starting others takes 1 to 2 s, of which half the work must be saved
_LOOK_S = 0.3


def progress_line(name: str, done: float, seconds_left: float) -> str:
    """A bar of text with what is left, for a status line."""
    full = round(_BAR_SIGNS * done)
    bar = "━" * full + "╌" * (_BAR_SIGNS - full)
    return f"preparing {Path(name).name} {bar} {100 * done:.0f} %, {format_seconds(seconds_left)} left"


def do_all(work: ChunkWork, progress: Progress) -> None:
    """Write the rows of all chunks into `work.folder`, as *.arrow in the order of their names.

    With `work.stops_at_bad` what follows the first bad row may be missing.
    """
    folder = Path(work.folder)
    chunks = list(work.source.chunks())
    alone = _alone(work, chunks, folder / "a.arrow", progress)
    if alone < len(chunks):
        _together(work, list(enumerate(chunks))[alone:], folder / "b.arrow", progress)
    clear_marks(folder)


def _alone(work: ChunkWork, chunks: Sequence[Chunk], file: Path, progress: Progress) -> int:
    """How many chunks were done in this process: all, or those after which more processes pay."""
    started, cores = time.perf_counter(), _cores()
    with file.open("wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for done, chunk in enumerate(chunks, start=1):
            table = work.table(chunk)
            writer.write_table(table)
            if work.stops_at_bad and table["problem"].null_count < len(table):
                return len(chunks)
            seconds = time.perf_counter() - started
            if seconds < _TRIAL_S:
                continue
            left = seconds / done * (len(chunks) - done)
            if cores > 1 and left > _WORTH_S:
                return done
            progress(done / len(chunks), left)
    return len(chunks)


def _cores() -> int:
    count = getattr(os, "sched_getaffinity", None)
    return len(count(0)) if count else os.cpu_count() or 1


def _together(work: ChunkWork, numbered: Sequence[tuple[int, Chunk]], file: Path, progress: Progress) -> None:
    import datasets

    columns = {"at": [at for at, _ in numbered]}
    columns |= {name: [getattr(chunk, name) for _, chunk in numbered] for name in Chunk._fields}
    index = datasets.Dataset.from_dict(columns).with_format("arrow")
    with (
        _told(file.parent, len(numbered), progress),
        _without_bars(),
        _one_thread_each(),
        _deaths_refused(),
    ):
        index.map(
            work.in_worker,
            batched=True,
            batch_size=1,
            num_proc=min(_cores(), len(numbered)),
            remove_columns=index.column_names,
            features=datasets.Features.from_arrow_schema(SCHEMA),
            cache_file_name=str(file),
            load_from_cache_file=False,
            new_fingerprint="lowvram",
        )


@contextmanager
def _deaths_refused() -> Iterator[None]:
    """Raises: DoesNotFitError when a worker was killed; datasets knows no more than that it is gone."""
    try:
        yield
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise DoesNotFitError(
            "A process that prepared the data was killed, as happens when host memory runs out.",
            "Close other programs, then try again.",
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Ours tells of the whole, datasets' of each process."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """For there is a process for each core; datasets would set it as well, say so, and not undo it."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextmanager
def _told(folder: Path, total: int, progress: Progress) -> Iterator[None]:
    """`progress` hears, from a thread of its own, how far the worker processes are."""
    finished, started = threading.Event(), time.perf_counter()

    def tell() -> None:
        while not finished.wait(_LOOK_S):
            if done := chunks_done(folder):
                progress(done / total, (time.perf_counter() - started) / done * (total - done))

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        finished.set()
        teller.join()
