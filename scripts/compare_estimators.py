"""Runs other memory estimators on published peaks, each in its own environment: benchmarks/estimators*

    python scripts/compare_estimators.py [--work FOLDER] [--refresh]

Needs Python 3.10 or newer and PyPI, nothing else: no GPU, no weights, no Hugging Face hub. Each tool's real
output goes to benchmarks/estimators/TOOL.txt. lowvram's own column comes from benchmarks/prediction.csv,
where there is one; --refresh takes it in without running the other tools again.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from estimator_tools import GIB, TOOLS, TORCH, Question, Row, Tool, folder_name
from local_hub import serve

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "benchmarks"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

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


def environment(package: str, requirements: list[str], work: Path) -> Path:
    """A virtual environment with this package, made once in each folder."""
    venv = work / package
    if not (venv / "installed").exists():
        print(f"Installing {package} into {venv}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        pip = [f"{venv}/bin/python", "-m", "pip", "install", "--quiet"]
        if TORCH in requirements and subprocess.run([*pip, TORCH], capture_output=True).returncode:
            subprocess.run([*pip, TORCH, "--index-url", TORCH_INDEX], check=True)
        no_kernels = {**os.environ, "DS_BUILD_OPS": "0"}
        subprocess.run([*pip, "setuptools", "wheel", *requirements], check=True, env=no_kernels)
        (venv / "installed").touch()
    return venv


def version_of(package: str, venv: Path) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
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
    venv, raw = environment(tool.package, tool.requirements, work), []
    named = {"estimator": tool.name, "version": version_of(tool.package, venv)}
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
