"""Shared fixtures: tiny real architectures, the real SmolLM2, and the switch for slow tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.forked_cli import ForkedCli

warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|bitsandbytes")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests take the PyPI road; the hub road is tested by name

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k-test.jsonl"
QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture
def config_only(tmp_path: Path) -> Callable[[dict[str, object]], Path]:
    """A model folder that holds a config.json and nothing else."""

    def make(config: dict[str, object]) -> Path:
        folder = tmp_path / str(config["model_type"])
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder that this process may neither list nor enter, even when the tests run as root."""
    if sys.platform == "win32":
        pytest.skip("permissions are another matter there")
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name) / "locked"
        folder.mkdir(mode=0o000)
        Path(name).chmod(0o755)
        os.seteuid(user or 65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            folder.chmod(0o700)


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The real SmolLM2-135M-Instruct, fetched and converted once into lowvram's cache."""
    from lowvram.demo.model import demo_model

    return Path(demo_model(print))


@pytest.fixture(scope="session")
def lowvram() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the real command line in a process of its own."""

    def run(*args: object, cwd: Path | None = None, timeout: int = 1800) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from lowvram.cli import main; main()", *map(str, args)]
        environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=cwd, timeout=timeout, env=environment, check=False
        )

    return run


@pytest.fixture(scope="session")
def forked_cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedCli]:
    """The real command line in forks of a warm process, which faults may hit."""
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    from tests.forked_cli import ForkedCli

    made = ForkedCli(tmp_path_factory.mktemp("forked"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def fault_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny real model with its data, which other users may read."""
    from tests.fault_run import save_home

    return save_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors of a hundred numbers: a second thread only waits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
