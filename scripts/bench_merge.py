#!/usr/bin/env python3
"""Merging, lowvram against peft: host memory and time of the same 3 GB model: benchmarks/merge.csv

    python scripts/bench_merge.py [--rounds N] [--layers N] [--work FOLDER]

A Llama of random bf16 weights with a vocabulary of 128,256 and an all-linear LoRA of rank 16 are generated.
lowvram streams base + adapter into new shards (synced to disk); peft's path loads the model in 16 bits,
merges with merge_and_unload and saves with save_pretrained. Each runs in a process of its own, in turns.
Memory is the peak of the resident set beyond what the imports took; peft's holds pages of mapped files too,
so its anonymous memory is a column as well. Rows of 7B and 70B models are predicted by the formula that the
merge announces. Needs 10 GB of disk, no GPU, no network.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from bench_rows import here, medians, ratios, write
from peft import LoraConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lowvram.engine.source import ModelSource  # noqa: E402
from lowvram.export.empty_model import empty_model  # noqa: E402
from lowvram.export.merge import merge_adapter  # noqa: E402
from lowvram.export.merged_tensors import MergedTensors, working_bytes  # noqa: E402
from lowvram.export.shards import NamedPieces, write_shards  # noqa: E402
from lowvram.export.tensor_changes import LowRank  # noqa: E402
from lowvram.export.tensor_files import StoredTensor  # noqa: E402
from lowvram.units import GiB, MiB  # noqa: E402

FILE = ROOT / "benchmarks" / "merge.csv"
RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREDICTED = ("Qwen/Qwen2-7B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "Qwen/Qwen2-72B")
_SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
}


def generate(folder: Path, layers: int) -> None:
    """The base and its adapter, piece by piece."""
    from transformers import LlamaConfig

    base, adapter = folder / "base", folder / "adapter"
    for made in (base, adapter):
        made.mkdir(parents=True)
    config = LlamaConfig(**_SHAPE, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])
    config.save_pretrained(base)
    generator = torch.Generator().manual_seed(0)

    def normal(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> NamedPieces:
        tensor = StoredTensor(base, name, 0, shape, dtype)  # for its spans

        def pieces() -> Iterator[torch.Tensor]:
            for start, stop in tensor.spans():
                drawn = torch.empty((stop - start, *shape[1:])).normal_(0, 0.02, generator=generator)
                yield drawn.to(dtype)

        return NamedPieces(name, dtype, shape, pieces)

    shapes = _shapes(ModelSource(str(base)))
    write_shards([normal(n, s, torch.bfloat16) for n, s in shapes.items()], base, 4 * GiB, _silent)
    factors = [
        normal(f"base_model.model.{name}.{side}.weight", shape, torch.float32)
        for name, (n_out, n_in) in _adapted(shapes).items()
        for side, shape in (("lora_A", (RANK, n_in)), ("lora_B", (n_out, RANK)))
    ]
    write_shards(factors, adapter, 4 * GiB, _silent)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    LoraConfig(r=RANK, lora_alpha=32, target_modules=list(TARGETS)).save_pretrained(str(adapter))


def _silent(_done: int, _total: int) -> None:
    """No progress is shown."""


def _shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in empty_model(source).named_parameters()}


def _adapted(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items()}
    return {name: shape for name, shape in modules.items() if name.endswith(TARGETS)}


def once(side: str, folder: Path, output: Path) -> dict[str, Any]:
    """One merge in this process: seconds, and memory beyond the imports."""
    run = _ours if side == "lowvram" else _peft
    import transformers.models.llama.modeling_llama  # noqa: F401  # an import is no memory of the merge
    from peft import PeftModel  # noqa: F401

    process = psutil.Process()
    before, anonymous = process.memory_info().rss, _anonymous()
    with _Peak() as peak:
        started = time.perf_counter()
        run(folder, output)
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak_bytes": peak.rss - before,
        "anonymous_bytes": peak.anonymous - anonymous,
    }


def _ours(folder: Path, output: Path) -> None:
    merge_adapter(ModelSource(str(folder / "base")), folder / "adapter", output)


def _peft(folder: Path, output: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    merged.save_pretrained(output, max_shard_size="4GB")


class _Peak:
    """Highest resident and anonymous memory of this process, looked at every 5 ms."""

    def __enter__(self) -> _Peak:
        self.rss = self.anonymous = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._over.wait(0.005):
            self.rss = max(self.rss, process.memory_info().rss)
            self.anonymous = max(self.anonymous, _anonymous())


def _anonymous() -> int:
    """Bytes that no file backs; the system can take the others back."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measured(rounds: int, folder: Path) -> dict[str, Any]:
    """One row: both sides in turns."""
    found: list[dict[str, dict[str, Any]]] = []
    for number in range(rounds):
        sides = ("lowvram", "peft") if number % 2 == 0 else ("peft", "lowvram")
        found.append({side: _in_its_own_process(side, folder) for side in sides})
        print(found[-1], flush=True)
    seconds = [[r["lowvram"]["seconds"], r["peft"]["seconds"]] for r in found]
    ours, theirs = medians(seconds)
    tensors = MergedTensors.open(ModelSource(str(folder / "base")), folder / "adapter")
    n_bytes = sum(map(tensors.n_bytes, tensors.names))
    peaks = {
        f"{side}_{kind}_mib": round(max(r[side][f"{kind}_bytes"] for r in found) / MiB)
        for side in ("lowvram", "peft")
        for kind in ("peak", "anonymous")
    }
    return {
        "model": "generated Llama",
        "kind": "measured",
        "gb": round(n_bytes / 1e9, 2),
        **_limits([tensors.shape(name) for name in tensors.names], tensors.working_bytes()),
        **peaks,
        "lowvram_s_per_gb": round(ours / n_bytes * 1e9, 2),
        "peft_s_per_gb": round(theirs / n_bytes * 1e9, 2),
        **ratios([[theirs, ours] for ours, theirs in seconds]),
        **here("torch", "transformers", "peft"),
    }


def _limits(shapes: list[tuple[int, ...]], working: int) -> dict[str, Any]:
    largest = max(torch.Size(shape).numel() for shape in shapes)
    return {
        "largest_tensor_f32_mib": round(4 * largest / MiB),
        "allowed_mib": round(8 * largest / MiB + 300e6 / MiB),
        "announced_mib": round(working / MiB),
    }


def predicted(name: str) -> dict[str, Any]:
    """One row of a model whose weights are not here."""
    shapes = _shapes(ModelSource(name))
    place = Path(name)
    tensors = [StoredTensor(place, n, 0, shape, torch.bfloat16) for n, shape in shapes.items()]
    pairs = [
        LowRank(
            StoredTensor(place, module, 0, (RANK, n_in), torch.float32),
            StoredTensor(place, module, 0, (n_out, RANK), torch.float32),
            scaling=1.0,
            turned=False,
        )
        for module, (n_out, n_in) in _adapted(shapes).items()
    ]
    n_bytes = sum(tensor.n_bytes for tensor in tensors)
    limits = _limits(list(shapes.values()), working_bytes(tensors, pairs))
    return {"model": name, "kind": "predicted", "gb": round(n_bytes / 1e9, 1), **limits}


def _in_its_own_process(side: str, folder: Path) -> dict[str, Any]:
    output = folder / "out"
    call = [sys.executable, __file__, "--once", side, "--work", str(folder)]
    done = subprocess.run(
        call, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    shutil.rmtree(output, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--once", choices=("lowvram", "peft"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once(options.once, options.work, options.work / "out")))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"  # shapes of the predicted ones come from the shipped table
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        generate(folder, options.layers)
        first = measured(options.rounds, folder)
    rows = [first, *({**dict.fromkeys(first, ""), **predicted(model)} for model in PREDICTED)]
    write(rows, FILE)


if __name__ == "__main__":
    main()
