"""The adapter alone as a folder for others: peft's files and tokenizer, without a path of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lowvram.engine.adapter_names import CONFIG_FILE, WEIGHTS_FILE
from lowvram.export.adapter_files import read_adapter_config
from lowvram.export.base_files import copy_tokenizer
from lowvram.export.model_card import named
from lowvram.frozen import write_atomically


def write_adapter(adapter: Path, base_model: str, output: Path) -> None:
    """Copy what peft and transformers read of `adapter` into the folder `output`.

    Args:
        base_model: hub id or folder; of a folder only its last name is written, which peft cannot load by
            itself: `PeftModel.from_pretrained(base, folder)` can.
    """
    config = {**read_adapter_config(adapter), "base_model_name_or_path": named(base_model)}
    write_atomically(output / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    shutil.copyfile(adapter / WEIGHTS_FILE, output / WEIGHTS_FILE)
    copy_tokenizer(adapter, output)
