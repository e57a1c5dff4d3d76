"""Held-out loss of saved adapters by plain transformers and peft; scripts/bench_training.py runs it.

    python scripts/judge_adapters.py MODEL ROWS.json ADAPTER...

ROWS.json has input_ids and labels of each row. Prints a JSON list: the loss per trained token of the NF4 base
alone, then with each adapter. It knows neither lowvram nor TRL.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

ROWS_AT_ONCE = 8
DTYPE = torch.float32  # the finest that the machine has: what is compared is how well adapters learned


@torch.no_grad()
def held_out_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Summed over all trained tokens of all rows and divided by their number."""
    total, count = 0.0, 0
    for at in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[at : at + ROWS_AT_ONCE]
        ids, labels, mask = (_padded(some, *how) for how in (("input_ids", 0), ("labels", -100), ("mask", 0)))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
        chosen = labels[:, 1:] != -100
        wanted = labels[:, 1:][chosen]
        total += float(torch.nn.functional.cross_entropy(logits[chosen].float(), wanted, reduction="sum"))
        count += len(wanted)
    return total / count


def _padded(rows: list[dict[str, list[int]]], key: str, filler: int) -> torch.Tensor:  # [B, T]
    width = max(len(row["input_ids"]) for row in rows)
    values = (row[key] if key in row else [1] * len(row["input_ids"]) for row in rows)
    return torch.tensor([[*value, *[filler] * (width - len(value))] for value in values])


def main() -> None:
    name, file, *adapters = sys.argv[1:]
    rows = sorted(json.loads(Path(file).read_text(encoding="utf-8")), key=lambda row: len(row["input_ids"]))
    base = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=DTYPE,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE
        ),
    ).eval()
    # wrapped before it is run: on some CPUs bitsandbytes packs weights anew when they are first evaluated,
    # and a layer that peft wraps after that reads them wrongly (loss 16.8 instead of 0.85)
    model = PeftModel.from_pretrained(base, adapters[0], adapter_name="0").eval()
    for number, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, str(number))
    with model.disable_adapter():
        losses = [held_out_loss(model, rows)]
    for number in range(len(adapters)):
        model.set_adapter(str(number))
        losses.append(held_out_loss(model.eval(), rows))
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
