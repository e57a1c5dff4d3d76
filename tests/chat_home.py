"""A tiny base with two adapters as runs leave them, and what each answers in plain peft."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowvram.data.conversations import Message
from lowvram.data.prompting import prompt_ids
from lowvram.engine.generate import Answer, Answers
from lowvram.engine.sampling import Sampling
from tests.tiny_adapters import alone, save_adapter

GREEDY = Sampling()


@pytest.fixture(scope="session")
def chat_home(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, and the runs sql/ and poet/ with an adapter/ each."""
    folder = tmp_path_factory.mktemp("chat_home")
    torch.manual_seed(1)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(byte_model),
        AutoTokenizer.from_pretrained(byte_model),
    )
    for parameter in model.parameters():
        parameter.data.mul_(4)  # or the likeliest token is the same everywhere
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for seed, name in enumerate(("sql", "poet")):
        adapter = save_adapter(folder / "base", folder / name / "adapter", seed)
        tokenizer.save_pretrained(adapter)
    return folder


class Reference:
    """Answers of the base, or of one adapter alone on it, in plain peft."""

    def __init__(self, home: Path, name: str | None) -> None:
        model: Any = alone(home / "base", home / name / "adapter" if name else None)
        self.tokenizer = AutoTokenizer.from_pretrained(home / "base")
        self.answers = Answers.of(model.get_base_model() if name else model, self.tokenizer)

    def to(
        self,
        turns: Sequence[tuple[str, str]],
        n: int,
        sampling: Sampling = GREEDY,
        row: int = 0,
    ) -> Answer:
        """To turns as (role, content)."""
        messages = [Message.model_validate({"role": role, "content": content}) for role, content in turns]
        return self.answers.to([prompt_ids(messages, self.tokenizer)], n, sampling, [row])[0]
