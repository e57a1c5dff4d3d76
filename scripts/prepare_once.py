"""One preparation of a file, timed, by lowvram or by TRL; scripts/bench_data.py runs it.

    python scripts/prepare_once.py lowvram|trl FILE MODEL PROCESSES

Prints one JSON object: wall and CPU seconds (worker processes included), tokens, trained tokens. Both use
the tokenizer of MODEL with one ChatML template that marks the assistant's words for TRL.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def measured(prepare: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it makes, and what that took."""
    started, before = time.perf_counter(), os.times()
    made = prepare()
    seconds, after = time.perf_counter() - started, os.times()
    used = sum(after[:4]) - sum(before[:4])
    return made, {"seconds": round(seconds, 3), "cpu_seconds": round(used, 2)}


def by_lowvram(file: str, tokenizer: Any, _: int) -> dict[str, Any]:
    from lowvram.data.shapes import Reading
    from lowvram.training.data import prepare

    source: Any = type("Source", (), {"tokenizer": tokenizer})()
    made, took = measured(lambda: prepare(file, source, reading=Reading()))
    sides = (made.train, made.held_out)
    tokens, trained = (sum(int(getattr(s, of).sum()) for s in sides) for of in ("lengths", "n_trained"))
    return {**took, "tokens": tokens, "trained": trained}


def by_trl(file: str, tokenizer: Any, processes: int) -> dict[str, Any]:
    from datasets import Dataset, load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tiny = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=len(tokenizer),
    )
    with open(file, encoding="utf-8") as lines:
        first = json.loads(next(lines))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=None,
            assistant_only_loss="messages" in first,
            dataset_num_proc=processes,
        )
        trainer = SFTTrainer(
            model=LlamaForCausalLM(tiny),
            args=arguments,
            train_dataset=Dataset.from_list([first]),
            processing_class=tokenizer,
        )

        def prepare() -> Any:
            rows = load_dataset("json", data_files=file, split="train")
            return trainer._prepare_dataset(rows, tokenizer, arguments, False, None, "train")

        made, took = measured(prepare)
    labels = made.with_format("numpy")["labels"]
    return {
        **took,
        "tokens": sum(map(len, labels)),
        "trained": sum(int((row != -100).sum()) for row in labels),
    }


if __name__ == "__main__":
    from transformers import AutoTokenizer

    name, file, model, processes = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHATML
    answer = {"lowvram": by_lowvram, "trl": by_trl}[name](file, tokenizer, int(processes))
    print(json.dumps(answer))
