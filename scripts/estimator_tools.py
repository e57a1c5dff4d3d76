"""The other memory estimators: how each is installed and asked about a row, and what it cannot express."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TORCH = "torch==2.13.0+cpu"  # the CPU build; see scripts/environment.sh
GIB = 2**30
QKVO = "q_proj k_proj v_proj o_proj"
Row = dict[str, str]

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
