"""ModelSource and the hub: an answer, a cache, no network, no access; when the shipped table stands in."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import DryRunFileInfo, constants
from safetensors.torch import save_file
from transformers import AutoConfig

from lowvram import cli, planning
from lowvram.engine import hub
from lowvram.engine.hub import Refusal
from lowvram.engine.source import INDEX_FILE, SINGLE_FILE, ModelSource
from lowvram.errors import ConfigError
from tests.conftest import QWEN2_7B

Answer = dict[str, str]
NAME = "Qwen/Qwen2-7B"
COMMIT = "0" * 40
UNREACHABLE = Refusal("the hub is not reachable", "ConnectError")
GATED = Refusal("the hub asks for access to this model", "HTTP 403", needs_access=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[[Refusal | None], None]:
    """Decides what the hub says."""
    return lambda answer: monkeypatch.setattr(hub, "refusal", lambda _: answer)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Points the hub's client at another address."""

    def point(address: str) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return point


@pytest.fixture
def hub_that_answers(online: Callable[[str], None]) -> Iterator[Callable[[int, Answer], None]]:
    """A real server in the hub's place, which answers everything with one status and these headers."""
    answer: dict[str, object] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answer["status"])
            for key, value in answer["headers"].items():
                self.send_header(key, value)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online(f"http://127.0.0.1:{server.server_port}")
    yield lambda status, headers: answer.update(status=status, headers=headers)
    server.shutdown()
    server.server_close()


def _cached(cache: Path, name: str) -> Path:
    """The folder in which the hub's client keeps a model."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (200, {"ETag": "x", "X-Repo-Commit": COMMIT}, None),
        (200, {}, "the hub is not reachable"),  # a login page
        (404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, None),
        (401, {"X-Error-Code": "RepoNotFound"}, None),
        (401, {"X-Error-Code": "GatedRepo"}, "the hub asks for access to this model"),
        (403, {"X-Error-Code": "GatedRepo"}, "the hub asks for access to this model"),
        (403, {}, "the hub denies access"),
        (503, {}, "the hub does not serve requests now"),
    ],
)
def test_what_the_hub_answers(
    hub_that_answers: Callable[[int, Answer], None], status: int, headers: Answer, reason: str | None
) -> None:
    hub_that_answers(status, headers)
    refusal = hub.refusal(NAME)
    assert (refusal and refusal.reason) == reason
    assert (refusal is not None and refusal.needs_access) == (status in (401, 403) and reason is not None)


def test_a_hub_that_accepts_and_stays_silent_is_not_waited_for(
    online: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        online(f"http://127.0.0.1:{silent.getsockname()[1]}")
        refusal = hub.refusal(NAME)
    assert refusal is not None
    assert refusal.reason == "the hub is not reachable"


def test_no_hub_at_that_address(online: Callable[[str], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    online(f"http://127.0.0.1:{port}")
    refusal = hub.refusal(NAME)
    assert refusal is not None
    assert refusal.reason == "the hub is not reachable"
    assert "Connect" in refusal.detail


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert str(hub.refusal(NAME)) == "HF_HUB_OFFLINE is set"
    assert hub.refusal("no hub id") is None  # transformers tells what is wrong with it


@pytest.mark.parametrize("why", [UNREACHABLE, GATED])
def test_a_known_model_comes_from_the_table(refused: Callable[[Refusal], None], why: Refusal) -> None:
    refused(why)
    source = ModelSource("qwen/qwen2-7b")
    assert source.config.hidden_size == QWEN2_7B["hidden_size"]
    assert source.config.vocab_size == QWEN2_7B["vocab_size"]
    assert source.config_origin == "shipped table"


def test_the_cache_goes_before_the_table(cache: Path, refused: Callable[[Refusal], None]) -> None:
    refused(UNREACHABLE)
    (_cached(cache, NAME) / "config.json").write_text(json.dumps(QWEN2_7B | {"hidden_size": 56}))
    source = ModelSource(NAME)
    assert source.config.hidden_size == 56
    assert source.config_origin == "hub"


@pytest.mark.parametrize("content", ["{", '{"model_type": "nonsense"}'])
def test_a_broken_cached_config_is_not_hidden(
    cache: Path, refused: Callable[[Refusal], None], content: str
) -> None:
    refused(UNREACHABLE)
    (_cached(cache, NAME) / "config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        _ = ModelSource(NAME).config
    assert "not reachable" not in caught.value.message


def test_an_answer_of_the_hub_goes_before_the_table(
    refused: Callable[[Refusal | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError("Qwen/Qwen2-7B is not a valid model identifier")

    refused(None)
    monkeypatch.setattr(AutoConfig, "from_pretrained", missing)
    with pytest.raises(ConfigError, match="not a valid model identifier"):
        _ = ModelSource(NAME).config


def test_a_folder_is_never_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "refusal", lambda _: pytest.fail("asked the hub for a folder"))
    folder = Path(NAME)
    folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        _ = ModelSource(NAME).config
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError):
        _ = ModelSource(NAME).config
    (folder / "config.json").write_text(json.dumps(QWEN2_7B))
    assert ModelSource(NAME).config_origin == "folder"


def test_an_unknown_model_is_refused_with_the_nearest_name(refused: Callable[[Refusal], None]) -> None:
    refused(UNREACHABLE)
    with pytest.raises(ConfigError) as caught:
        _ = ModelSource("Qwen/Qwen2-7b-chat").config
    assert "was not found here or on the hub: the hub is not reachable" in caught.value.message
    assert caught.value.remedy.endswith("Or did you mean Qwen/Qwen2-7B?")
    with pytest.raises(ConfigError) as caught:
        _ = ModelSource("acme/secret").config
    assert "did you mean" not in caught.value.remedy


def test_an_unknown_model_without_access_is_told_how_to_ask(refused: Callable[[Refusal], None]) -> None:
    refused(GATED)
    with pytest.raises(ConfigError) as caught:
        _ = ModelSource("acme/secret").config
    assert caught.value.remedy.startswith("Ask for access at huggingface.co/acme/secret")


def test_download_size_without_the_hub(cache: Path, refused: Callable[[Refusal], None]) -> None:
    refused(UNREACHABLE)
    assert ModelSource(NAME).download_bytes() == 2 * 7_615_616_512
    assert ModelSource("acme/secret").download_bytes() is None
    _weights(_cached(cache, NAME))
    assert ModelSource(NAME).download_bytes() == 0


@pytest.mark.parametrize(
    ("sizes", "n_bytes"),
    [
        ({"model.safetensors": 100, "model.fp16.safetensors": 50}, 100),
        ({"model-00001-of-00002.safetensors": 70, "model-00002-of-00002.safetensors": 30}, 100),
    ],
)
def test_the_download_is_what_transformers_loads(
    refused: Callable[[None], None], monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], n_bytes: int
) -> None:
    refused(None)
    files = [DryRunFileInfo(COMMIT, size, name, name, False, True) for name, size in sizes.items()]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: files)
    assert ModelSource("acme/open").download_bytes() == n_bytes


def _weights(folder: Path) -> None:
    """Two shards and their index."""
    for shard in ("a", "b"):
        save_file({shard: torch.zeros(8)}, folder / f"{shard}.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_training_needs_weights_that_can_be_had(cache: Path, refused: Callable[[Refusal], None]) -> None:
    refused(UNREACHABLE)
    source, snapshot = ModelSource(NAME), _cached(cache, NAME)
    with pytest.raises(
        ConfigError, match=r"does not have the weights of 'Qwen/Qwen2-7B', and the hub is not"
    ):
        source.require_weights()
    _weights(snapshot)
    source.require_weights()
    (snapshot / "b.safetensors").unlink()  # an interrupted download
    with pytest.raises(ConfigError, match="weights"):
        source.require_weights()


def test_one_file_of_weights_is_enough_unless_cut_off(
    cache: Path, refused: Callable[[Refusal], None]
) -> None:
    refused(UNREACHABLE)
    file = _cached(cache, NAME) / SINGLE_FILE
    save_file({"a": torch.zeros(64)}, file)
    ModelSource(NAME).require_weights()
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ConfigError, match="weights"):
        ModelSource(NAME).require_weights()


def test_a_broken_table_of_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_7B))
    for text in (b"[1]", b'{"a": 5}', b'{"a": {}}', b'{"a": {"data_offsets": []}}', b'{"a": '):
        (tmp_path / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(ConfigError, match="broken safetensors header"):
            ModelSource(str(tmp_path)).require_weights()


@pytest.mark.parametrize(
    ("why", "name", "remedy"),
    [
        (UNREACHABLE, NAME, "Let this machine reach the hub, or give a local folder."),
        (UNREACHABLE, "meta-llama/Llama-3.2-1B", "asks for access to this model: huggingface.co/meta-llama"),
        (UNREACHABLE, "unsloth/Llama-3.2-1B", "Let this machine reach the hub, or give a local folder."),
        (GATED, "meta-llama/Llama-3.2-1B", "Ask for access at huggingface.co/meta-llama/Llama-3.2-1B"),
    ],
)
def test_the_remedy_knows_which_models_need_access(
    refused: Callable[[Refusal], None], why: Refusal, name: str, remedy: str
) -> None:
    refused(why)
    with pytest.raises(ConfigError) as caught:
        ModelSource(name).require_weights()
    assert remedy in caught.value.remedy


def test_a_tokenizer_out_of_reach_is_not_looked_for_in_a_folder(refused: Callable[[Refusal], None]) -> None:
    refused(UNREACHABLE)
    with pytest.raises(ConfigError) as caught:
        _ = ModelSource(NAME).tokenizer
    assert "does not have the tokenizer" in caught.value.message
    assert "without --data" in caught.value.remedy


def _cli(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", ["lowvram", *map(str, args)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_plan_says_that_its_config_is_from_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("plan", "--model", "HuggingFaceTB/SmolLM2-135M", "--vram", "8GB", "--seq-len", "64", "--json")
    assert _cli(monkeypatch, *given) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "config from the shipped table (HF_HUB_OFFLINE is set)" in plan["reasons"]


def test_training_is_refused_before_planning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "plan_for", lambda *_: pytest.fail("planned what cannot be trained"))
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    assert _cli(monkeypatch, "auto", "--model", NAME, "--data", data, "-o", tmp_path / "run") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "does not have the weights of 'Qwen/Qwen2-7B', and HF_HUB_OFFLINE is set." in error
    assert not (tmp_path / "run").exists()
