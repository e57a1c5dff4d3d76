"""By which road a GGUF gets its number format; llama.cpp's own quantizer program is one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lowvram.errors import ConfigError, first_line
from lowvram.export.gguf_kquants import NO_QUANTIZER, ggml_quantize
from lowvram.export.gguf_model import Check, GgufModel, Progress, unchecked
from lowvram.export.gguf_tensors import EMBEDDING
from lowvram.export.gguf_types import FILE_TYPES, FileType
from lowvram.export.partial_folder import require_disk
from lowvram.export.whole_file import whole_file

PROGRAM = "llama-quantize"
_COUNT = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")  # "[  12/ 291] blk.1.ffn_down.weight ..."


@dataclass(frozen=True)
class QuantizedModel:
    """A GGUF file to be that llama.cpp's program makes of one in 16 bits (32 where the base has them)."""

    model: GgufModel
    kind: FileType
    program: Path

    def require_room(self, output: Path) -> None:
        """Raises:
        DoesNotFitError: too little disk for both files.
        """
        n_bytes = self.model.n_bytes() + self.model.n_bytes(self.kind)
        require_disk(output, n_bytes, "The GGUF, with its 16-bit source,")

    def write(self, output: Path, progress: Progress | None = None, check: Check = unchecked) -> list[str]:
        """Write the file whole or not at all; what llama.cpp will do otherwise than transformers.

        Raises:
            ConfigError: `output` is there already, or the program failed.
            DoesNotFitError: too little disk for both files.
        """
        told = progress or (lambda _done, _total: None)
        whole = output.with_name(f".{output.name}.unquantized")
        self.require_room(output)
        size = self.model.tensor_bytes(self.kind)
        with whole_file(output) as partial:
            whole.unlink(missing_ok=True)  # of a process that was killed
            try:
                notes = self.model.write(whole, told)
                _run(self.program, whole, partial, self.kind, lambda share: told(int(share * size), size))
            finally:
                whole.unlink(missing_ok=True)
            check(partial)
        return notes


def for_kind(model: GgufModel, kind: FileType, given: Path | None) -> GgufModel | QuantizedModel:
    """By which road the model comes to `kind`: our own writer, an installed ggml, or llama.cpp's program.

    Raises:
        ConfigError: none of them can.
    """
    if not kind.mixed:
        if given is not None:
            raise ConfigError(f"--quantizer is not used for --type {kind.name}.", "Leave it out.")
        return model.as_kind(kind)
    program = _program(given) if given is not None else None
    if program is None and ggml_quantize() is not None:
        return model.as_kind(kind)
    found = program or shutil.which(PROGRAM)
    if found is None:
        raise ConfigError(f"Nothing here can quantize to {kind.name}.", NO_QUANTIZER)
    stored = model.tensors.dtype(EMBEDDING)
    lossless = {torch.float16: "f16", torch.float32: "f32"}.get(stored, "bf16")
    return QuantizedModel(model.as_kind(FILE_TYPES[lossless]), kind, Path(found))


def _program(given: Path) -> Path:
    if not given.is_file() or not os.access(given, os.X_OK):
        raise ConfigError(f"--quantizer '{given}' is no program.", f"Give the path of {PROGRAM}.")
    return given.absolute()


def _run(program: Path, source: Path, output: Path, kind: FileType, told: Callable[[float], None]) -> None:
    """Run the program; `told` hears the share of the tensors that its lines say are done."""
    command = [str(program), str(source), str(output), kind.name.upper()]
    said = "nothing"
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise ConfigError(
            f"'{program}' does not start: {first_line(error)}", "Give another --quantizer."
        ) from error
    with process:
        try:
            for line in process.stdout or ():
                said = line.strip() or said
                if counted := _COUNT.match(line):
                    told(int(counted[1]) / max(int(counted[2]), 1))
        except BaseException:
            process.kill()
            raise
    if process.returncode or not output.is_file():
        raise ConfigError(
            f"'{program}' ended with {process.returncode} and said: {said[:200]}",
            "Run it by hand on a GGUF of --type f16, or take --type q8_0.",
        )
