"""Runs other memory estimators on published peaks, each in its own environment: benchmarks/estimators*

    python scripts/compare_estimators.py [--work FOLDER] [--refresh]

Needs Python 3.10 or newer and PyPI, nothing else: no GPU, no weights, no Hugging Face hub. Each tool's real
output goes to benchmarks/estimators/TOOL.txt. lowvram's own column comes from benchmarks/prediction.csv,
where there is one; --refresh takes it in without running the other tools again.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from local_hub import serve

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "benchmarks"
TORCH = "torch==2.13.0+cpu"  # the CPU build; see scripts/environment.sh
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
GIB = 2**30
QKVO = "q_proj k_proj v_proj o_proj"
Row = dict[str, str]

# The rows that are compared: exact bytes, or (torchtune) the number everybody quotes.
IDS = (
    "vramcalc-llama-3.2-1b-full-bf16",
    "vramcalc-llama-3.2-1b-full-amp",
    "vramcalc-llama-3.2-3b-full-bf16-ckpt",
    "fms-mistral-7b-full-b4-tf448",
    "peft-llama-3.2-3b-full",
    "vramcalc-llama-3.2-1b-lora-bf16",
    "vramcalc-llama-3.2-1b-lora-amp-ckpt",
    "vramcalc-llama-3.2-3b-lora-bf16",
    "vramcalc-llama-3.1-8b-lora-bf16-ckpt",
    "vramcalc-qwen2.5-1.5b-lora-bf16",
    "fms-mistral-7b-lora-b4-tf448",
    "fms-mistral-7b-lora-b8-tf448",
    "peft-llama-3.2-3b-lora-r32",
    "fms-mistral-7b-qlora-b4-tf448",
    "fms-mistral-7b-qlora-b8-tf448",
    "fms-mistral-7b-qlora-trl-b4-tf448",
    "fms-mixtral-8x7b-qlora-b4-tf448",
    "torchtune-llama-3.1-8b-qlora",
)
# Parameters of the whole model and of its largest single layer: DeepSpeed's cold estimators ask for both.
PARAMETERS = {
    "Llama-3.2-1B": (1_235_814_400, 262_668_288),
    "Llama-3.2-3B": (3_212_749_824, 394_002_432),
    "Meta-Llama-3.1-8B": (8_030_261_248, 525_336_576),
    "Qwen2.5-1.5B": (1_543_714_304, 233_373_696),
    "Mistral-7B-v0.1": (7_241_732_096, 131_072_000),
    "Mixtral-8x7B-Instruct-v0.1": (46_702_792_704, 1_409_286_144),
}


class Question(NamedTuple):
    """One command that asks a tool about one row, and how to read its answer."""

    command: list[str]
    read: Callable[[str], int]
    mode: str  # what the number means, in the tool's own terms
    fits: bool  # the tool has a mode for this method; False: its nearest one was asked


class Tool(NamedTuple):
    name: str
    package: str  # whose version is reported
    requirements: list[str]
    ask: Callable[[Row, str], Question | None]  # (row, folder of config.json)
    lacks: Callable[[Row], str]  # what about this row it cannot express


def folder_name(model: str) -> str:
    """The folder under benchmarks/configs: an Instruct model has its base model's shape."""
    name = model.split("/")[-1]
    return name if name in PARAMETERS else name.removesuffix("-Instruct")


def seq_len(row: Row) -> str:
    """Rows of peft publish only the cap of their longest batch."""
    return row["seq_len"] or "768"


def gib_after(pattern: str) -> Callable[[str], int]:
    """Reads the last number that follows the pattern; these tools print 2^20 as MB and 2^30 as GB."""

    def read(output: str) -> int:
        number, unit = re.findall(pattern + r"[^\d\n]*([\d.]+) ?(MB|GB)", output)[-1]
        return round(float(number) * (GIB if unit == "GB" else 2**20))

    return read


def from_json(*keys: str) -> Callable[[str], float]:
    """Reads one number of the JSON object that stands at the beginning of a line of the output."""

    def read(output: str) -> float:
        value, _ = json.JSONDecoder().raw_decode(output, ("\n" + output).index("\n{"))
        for key in keys:
            value = value[0] if isinstance(value, list) else value
            value = value[key]
        return float(value)

    return read


# accelerate -------------------------------------------------------------------------------------------------


def ask_accelerate(row: Row, _folder: str) -> Question:
    dtype = "int4" if row["method"] == "qlora" else "float16"
    command = ["accelerate", "estimate-memory", row["model"]]
    command += ["--library_name", "transformers", "--dtypes", dtype]
    if row["method"] == "full":
        return Question(command, gib_after(rf"{dtype} *│[^│]*│[^│]*│"), "Training using Adam, float16", True)
    return Question(command, gib_after(rf"{dtype} *│[^│]*│"), f"Total Size, {dtype}: weights only", False)


def accelerate_lacks(row: Row) -> str:
    first = "pure bf16" if row["method"] == "full" else "adapters and their optimizer"
    return first + ", batch, sequence, checkpointing, activations, the head (it loads AutoModel)"


# DeepSpeed --------------------------------------------------------------------------------------------------


def ask_zero(stage: int) -> Callable[[Row, str], Question | None]:
    module = {2: "stage_1_and_2", 3: "stage3"}[stage]
    function = f"estimate_zero{stage}_model_states_mem_needs_all_cold"

    def ask(row: Row, _folder: str) -> Question | None:
        if row["method"] != "full":
            return None
        total, largest = PARAMETERS[folder_name(row["model"])]
        layers = f", largest_layer_params={largest}" if stage == 3 else ""
        code = (
            f"from deepspeed.runtime.zero.{module} import {function}; "
            f"{function}(total_params={total}{layers}, num_gpus_per_node=1, num_nodes=1)"
        )
        read = gib_after(r"\|(?=[ \d.]*GB \| .*offload_optimizer=none)")
        return Question(["python", "-c", code], read, f"ZeRO-{stage}, 1 GPU, no offload: model states", True)

    return ask


def zero_lacks(row: Row) -> str:
    if row["method"] != "full":
        return "adapters, quantisation: full mixed-precision training only"
    return "activations, batch, sequence, checkpointing, pure bf16 or fp32 (only 16 bit with fp32 copies)"


# llm-resource-planner ---------------------------------------------------------------------------------------


def ask_planner(_row: Row, folder: str) -> Question:
    read = gib_after("Total Recommended VRAM:")
    return Question(["llm-plan", folder], read, "inference in fp16 at 4096 tokens", False)


def planner_lacks(_row: Row) -> str:
    return "training, adapters, quantisation, batch, sequence, grouped-query attention, the vocabulary"


# hf-vram-calc -----------------------------------------------------------------------------------------------


def ask_hf_vram_calc(row: Row, folder: str) -> Question:
    # Its README lists nf4; the program rejects it, and int4 is the same size.
    dtype = {"fp32-amp": "fp32", "bf16": "bf16"}.get(row["base_precision"], "int4")
    command = ["hf-vram-calc", "--model", Path(folder).name, "--model_path", folder, "--dtype", dtype]
    command += ["--max_batch_size", row["batch"], "--max_seq_len", seq_len(row)]
    command += ["--output_json", "/dev/stdout"]
    key, mode = "training_gib", f"Training (Adam), {dtype}"
    if row["method"] != "full":
        command += ["--lora_rank", row["rank"]]
        key, mode = "lora_size_gib", f"LoRA, {dtype}"
    gib = from_json("memory_requirements", key)
    return Question(command, lambda output: round(gib(output) * GIB), mode, True)


def hf_vram_calc_lacks(row: Row) -> str:
    common = "activations of training (batch and sequence change its inference columns only), checkpointing"
    extra = {"full": "", "lora": ", targets", "qlora": ", targets, nf4 and double quantisation (int4 asked)"}
    return f"{common}, optimizer{extra[row['method']]}"


# vramcalc ---------------------------------------------------------------------------------------------------


def ask_vramcalc(row: Row, folder: str) -> Question:
    command = [
        "vramcalc",
        folder,
        "--train",
        "--json",
        "--batch",
        row["batch"],
        "--seq",
        seq_len(row),
        "--precision",
        "amp" if row["base_precision"] == "fp32-amp" else "pure",
        "--attn",
        "flash" if row["attention"] == "fa2" else row["attention"],
    ]
    command += ["--lora", row["rank"]] if row["rank"] else []
    command += ["--grad-checkpoint"] if row["checkpointing"] == "yes" else []
    quantised = row["method"] == "qlora"
    mode = "LoRA over a bf16 base" if quantised else "train, " + ("LoRA" if row["rank"] else "full")
    total = from_json("estimate", "total")
    fits = not quantised and bool(row["seq_len"])
    return Question(command, lambda output: round(total(output)), mode, fits)


def vramcalc_lacks(row: Row) -> str:
    missing = ["quantised base"] if row["method"] == "qlora" else []
    missing += ["mixture of experts (refused)"] if "Mixtral" in row["model"] else []
    missing += ["LoRA targets (always q, k, v, o)"] if row["targets"] not in ("", QKVO) else []
    missing += ["dropout"] if "dropout 0.1" in row["notes"] else []
    return ", ".join(missing + (["longest batch (768 is the published cap)"] if not row["seq_len"] else []))


TOOLS = (
    Tool("vramcalc", "vramcalc", ["vramcalc==0.1.2"], ask_vramcalc, vramcalc_lacks),
    Tool(
        "hf-vram-calc",
        "hf-vram-calc",
        [TORCH, "transformers==5.24.0", "hf-vram-calc==1.0.9"],
        ask_hf_vram_calc,
        hf_vram_calc_lacks,
    ),
    Tool(
        "accelerate",
        "accelerate",
        [TORCH, "transformers==5.24.0", "accelerate==1.15.0"],
        ask_accelerate,
        accelerate_lacks,
    ),
    Tool("deepspeed-zero2", "deepspeed", [TORCH, "deepspeed==0.19.8"], ask_zero(2), zero_lacks),
    Tool("deepspeed-zero3", "deepspeed", [TORCH, "deepspeed==0.19.8"], ask_zero(3), zero_lacks),
    Tool(
        "llm-resource-planner",
        "llm-resource-planner",
        ["transformers==5.24.0", "llm-resource-planner==0.2.0"],
        ask_planner,
        planner_lacks,
    ),
)


# Running them -----------------------------------------------------------------------------------------------


def environment(tool: Tool, work: Path) -> Path:
    """A virtual environment with this tool, made once per set of requirements."""
    venv = work / tool.package
    if not (venv / "installed").exists():
        print(f"Installing {tool.package} into {venv}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        pip = [f"{venv}/bin/python", "-m", "pip", "install", "--quiet"]
        if TORCH in tool.requirements and subprocess.run([*pip, TORCH], capture_output=True).returncode:
            subprocess.run([*pip, TORCH, "--index-url", TORCH_INDEX], check=True)
        no_kernels = {**os.environ, "DS_BUILD_OPS": "0"}
        subprocess.run([*pip, "setuptools", "wheel", *tool.requirements], check=True, env=no_kernels)
        (venv / "installed").touch()
    return venv


def version_of(tool: Tool, venv: Path) -> str:
    code = f"from importlib.metadata import version; print(version({tool.package!r}))"
    done = subprocess.run([f"{venv}/bin/python", "-c", code], capture_output=True, text=True, check=True)
    return str(done.stdout).strip()


def run(question: Question, venv: Path, hub: str) -> str:
    """What the tool prints, and its errors where it fails; the environment tells it where the hub is."""
    settings = {"HF_ENDPOINT": hub, "HF_HOME": f"{venv}/hf-home", "NO_COLOR": "1", "COLUMNS": "120"}
    program = [f"{venv}/bin/{question.command[0]}", *question.command[1:]]
    done = subprocess.run(program, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    return str(done.stdout) + (f"{done.stderr}[exit {done.returncode}]\n" if done.returncode else "")


def shown(command: list[str]) -> str:
    return " ".join(f"'{word}'" if " " in word else word for word in command)


def answers(tool: Tool, rows: list[Row], work: Path, hub: str) -> Iterator[Row]:
    """One line of estimators.csv per row; the raw outputs go to benchmarks/estimators."""
    venv, raw = environment(tool, work), []
    named = {"estimator": tool.name, "version": version_of(tool, venv)}
    for row in rows:
        question = tool.ask(row, f"benchmarks/configs/{folder_name(row['model'])}")
        line = {"id": row["id"], **named, "cannot_express": tool.lacks(row)}
        if question is None:
            yield {**line, "mode": "none"}
            continue
        output = run(question, venv, hub).replace(hub, "http://localhost").replace(str(venv), tool.package)
        raw.append(f"# {row['id']}\n$ {shown(question.command)}\n{output}")
        yield {**line, "command": shown(question.command), **judged(question, output, row)}
    (BENCH / "estimators" / f"{tool.name}.txt").write_text("\n".join(raw))


def judged(question: Question, output: str, row: Row) -> Row:
    if "[exit " in output:
        return {"mode": "refused"}
    predicted = question.read(output)
    return {"mode": question.mode, "fits": "yes" if question.fits else "nearest", **error(predicted, row)}


def error(predicted: int, row: Row) -> Row:
    reference = int(row["published_bytes"])
    return {
        "predicted_bytes": str(predicted),
        "reference_bytes": str(reference),
        "signed_error": f"{predicted / reference - 1:+.4f}",
    }


def ours(rows: list[Row]) -> Iterator[Row]:
    """lowvram's column, where scripts/bench_prediction.py has written it."""
    path = BENCH / "prediction.csv"
    known = {line["id"]: line for line in csv.DictReader(path.open())} if path.exists() else {}
    version = (ROOT / "lowvram/__init__.py").read_text().split('__version__ = "')[1].split('"')[0]
    for row in rows:
        if known.get(row["id"], {}).get("predicted_bytes"):
            yield {
                "id": row["id"],
                "estimator": "lowvram",
                "version": version,
                "mode": "trace of the step",
                "fits": "yes",
                "command": "python scripts/bench_prediction.py",
                **error(int(known[row["id"]]["predicted_bytes"]), row),
            }


# Writing ----------------------------------------------------------------------------------------------------

COLUMNS = (
    "id",
    "estimator",
    "version",
    "command",
    "predicted_bytes",
    "reference_bytes",
    "signed_error",
    "fits",
    "mode",
    "cannot_express",
)
NOTE = """
Signed error of the predicted peak; + is an over-estimate. In brackets: the tool has no mode for this method
(or the row does not publish what it asks for), and its nearest mode was asked; such cells stay out of the
last row. `-`: nothing to ask. vramcalc's constants were adjusted with the vramcalc rows. What each tool
cannot express, every command and its output: `benchmarks/estimators.csv` and `benchmarks/estimators/`.
"""


def cell(line: Row | None) -> str:
    if line is None or "signed_error" not in line:
        return "refused" if line and line["mode"] == "refused" else "-"
    percent = f"{100 * float(line['signed_error']):+.1f} %"
    return percent if line["fits"] == "yes" else f"({percent})"


def summary(lines: list[Row]) -> str:
    """Worst and under-estimates over the rows that the tool has a mode for."""
    errors = [float(line["signed_error"]) for line in lines if line.get("fits") == "yes"]
    if not errors:
        return "no mode"
    return f"{100 * max(errors, key=abs):+.1f} %, {sum(e < 0 for e in errors)} of {len(errors)} under"


def markdown(rows: list[Row], lines: list[Row]) -> str:
    names = list(dict.fromkeys(line["estimator"] for line in lines))
    found = {(line["id"], line["estimator"]): line for line in lines}
    table = [["Published peak", "Measured", *names], ["---"] * (len(names) + 2)]
    for row in rows:
        size = f"{int(row['published_bytes']) / GIB:.2f} GiB"
        table.append([row["id"], size, *(cell(found.get((row["id"], name))) for name in names)])
    worst = [summary([line for line in lines if line["estimator"] == name]) for name in names]
    table.append(["**worst error**", "", *worst])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table) + "\n" + NOTE


def asked(rows: list[Row], work: Path) -> list[Row]:
    """Every tool's answer to every row, by running it."""
    (BENCH / "estimators").mkdir(exist_ok=True)
    hub = serve({row["model"]: BENCH / "configs" / folder_name(row["model"]) for row in rows})
    url = f"http://127.0.0.1:{hub.server_port}"
    try:
        return [line for tool in TOOLS for line in answers(tool, rows, work, url)]
    finally:
        hub.shutdown()


def recorded() -> list[Row]:
    """The last run's lines of the other tools."""
    lines = csv.DictReader((BENCH / "estimators.csv").open())
    return [
        {key: value for key, value in line.items() if value}
        for line in lines
        if line["estimator"] != "lowvram"
    ]


def write(rows: list[Row], lines: list[Row]) -> None:
    with (BENCH / "estimators.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    (BENCH / "estimators.md").write_text(markdown(rows, lines))
    print(markdown(rows, lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="keep the tools' environments here, not in /tmp")
    parser.add_argument("--refresh", action="store_true", help="take in prediction.csv; run no tool")
    options = parser.parse_args()
    published = {row["id"]: row for row in csv.DictReader((BENCH / "published_peaks.csv").open())}
    rows = [published[name] for name in IDS]
    with tempfile.TemporaryDirectory() as temporary:
        others = recorded() if options.refresh else asked(rows, (options.work or Path(temporary)).resolve())
    write(rows, list(ours(rows)) + others)


if __name__ == "__main__":
    main()
