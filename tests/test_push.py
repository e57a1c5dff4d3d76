"""Push: the hub's own client against a stand-in hub on localhost, in a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import TOKEN, Hub, Repository, hub_server
from tests.merge_cases import CASES, save_adapter, save_base

CODE = """
import sys
from pathlib import Path
from lowvram.errors import LowvramError
from lowvram.export.push import files_of, push, require_pushable
folder, repo, public = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "public"
try:
    require_pushable(repo, public=public)
    print(push(files_of(folder), repo, public=public, again="hf upload"))
except LowvramError as error:
    print(error.message, "|", error.remedy)
    sys.exit(error.exit_code)
"""

CLI = "from lowvram.cli import main; main()"
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "merged"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "model.safetensors").write_bytes(os.urandom(100_000))
    return made


def call(hub: Hub, home: Path, code: str, *given: object, **environment: str) -> Done:
    """Python code in a process that knows `hub` as the hub, and no token of whoever runs the tests."""
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, given)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HOME": str(home), "COLUMNS": "200", **own, **environment},
        check=False,
    )


def pushed(hub: Hub, folder: Path, repo: str, kind: str = "private", **environment: str) -> Done:
    return call(hub, folder.parent / "home", CODE, folder, repo, kind, **environment)


@pytest.mark.parametrize("kind", ["private", "public"])
def test_the_repository_holds_every_byte(hub: Hub, folder: Path, kind: str) -> None:
    done = pushed(hub, folder, "me/mine", kind)
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/me/mine" in done.stdout
    found = hub.repositories["me/mine"]
    assert found.private == (kind == "private")
    assert found.n_commits == 1
    assert {n: found.files[n] for n in ("config.json", "model.safetensors")} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }
    assert TOKEN not in done.stdout + done.stderr


def test_a_repository_with_files_is_left_alone(hub: Hub, folder: Path) -> None:
    hub.repositories["me/mine"] = Repository(True, {"model.safetensors": b"mine"})
    done = pushed(hub, folder, "me/mine")
    assert done.returncode == 2
    assert "holds 1 files already, model.safetensors" in done.stdout
    assert hub.repositories["me/mine"].files == {"model.safetensors": b"mine"}


def test_a_public_one_is_not_taken_for_private(hub: Hub, folder: Path) -> None:
    hub.repositories["me/mine"] = Repository(False, {".gitattributes": b""})
    done = pushed(hub, folder, "me/mine")
    assert done.returncode == 2
    assert "is public" in done.stdout
    assert hub.repositories["me/mine"].n_commits == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"HF_TOKEN": ""}, "needs a token"),
        ({"HF_TOKEN": "hf_anotherSecret"}, "The hub refuses"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "not reachable"),
    ],
)
def test_refused_before_anything_is_made(hub: Hub, folder: Path, change: dict[str, str], said: str) -> None:
    done = pushed(hub, folder, "me/mine", **change)
    assert done.returncode == 2, done.stderr
    assert said in done.stdout
    assert not hub.repositories
    assert "Secret" not in done.stdout + done.stderr


def test_no_name_of_a_repository(hub: Hub, folder: Path) -> None:
    done = pushed(hub, folder, "me/mine/../../theirs")
    assert done.returncode == 2
    assert "no name of a repository" in done.stdout


def test_an_error_that_repeats_the_token_is_told_without_it(hub: Hub, folder: Path) -> None:
    hub.broken = True
    done = pushed(hub, folder, "me/mine")
    assert done.returncode == 2, done.stderr
    assert "HTTP 403" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert "model.safetensors" not in hub.repositories["me/mine"].files


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = save_base(CASES["plain"], tmp_path / "base")
    return save_adapter(base, CASES["plain"], tmp_path / "adapter")


def test_merge_pushes_what_it_wrote(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = call(hub, tmp_path / "home", CLI, "merge", adapter, "-o", output, "--push", "me/mine")
    assert done.returncode == 0, done.stderr
    assert f"Pushed: {hub.address}/me/mine" in done.stdout
    files = hub.repositories["me/mine"].files
    assert files.keys() - {".gitattributes"} == {file.name for file in output.iterdir()}
    assert all(files[file.name] == file.read_bytes() for file in output.iterdir())
    assert b"| lora_alpha | 8 |" in files["README.md"]
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]


def test_merge_asks_the_hub_first(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    """And a push that fails after the merge leaves what was written, and says how to push it."""
    given = (CLI, "merge", adapter, "-o", tmp_path / "out", "--push", "me/mine")
    done = call(hub, tmp_path / "home", *given, HF_TOKEN="")
    assert done.returncode == 2
    assert "hf auth login" in done.stderr
    assert not (tmp_path / "out").exists()
    done = call(hub, tmp_path / "home", CLI, "merge", adapter, "-o", tmp_path / "out", "--public")
    assert done.returncode == 2
    assert "--public says how to push" in done.stderr
    hub.broken = True
    done = call(hub, tmp_path / "home", *given)
    assert done.returncode == 2
    assert f"hf upload me/mine {tmp_path / 'out'} --private" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert TOKEN not in done.stdout + done.stderr


def typed_after(done: Done, start: str) -> list[str]:
    """The printed command from `start` on, in words as the shell splits them."""
    return shlex.split(done.stderr[done.stderr.index(start) :].splitlines()[0])


@pytest.mark.parametrize("public", [False, True])
def test_a_busy_hub_s_remedy_publishes_nothing(hub: Hub, adapter: Path, tmp_path: Path, public: bool) -> None:
    """What is printed makes a repository as private as the push would have; no sign-in helps with a 503."""
    hub.closed = True
    output, flags = tmp_path / "my out", ["--public"] if public else []
    done = call(hub, tmp_path / "home", CLI, "merge", adapter, "-o", output, "--push", "me/secret", *flags)
    assert done.returncode == 2
    assert "HTTP 503" in done.stderr
    assert "Try again later" in done.stderr
    assert "hf auth login" not in done.stderr
    private = [] if public else ["--private"]
    assert typed_after(done, "hf upload") == ["hf", "upload", "me/secret", str(output), *private]


def test_the_card_of_a_file_can_be_pushed_by_hand(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    hub.closed = True
    given = ("export", adapter, "--to", "lora-gguf", "--push", "me/mine")
    done = call(hub, tmp_path / "home", CLI, *given)
    assert done.returncode == 2
    card = adapter / "adapter.gguf.README.md"
    assert "A LoRA adapter as GGUF (f32)" in card.read_text()
    upload = ["hf", "upload", "me/mine"]
    assert typed_after(done, "hf upload") == [
        *(*upload, str(adapter / "adapter.gguf"), "--private", "&&"),
        *(*upload, str(card), "README.md", "--private"),
    ]


def test_a_file_in_the_card_s_place_stays(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    card = adapter / "adapter.gguf.README.md"
    card.write_text("mine")
    given = ("export", adapter, "--to", "lora-gguf", "--push", "me/mine")
    done = call(hub, tmp_path / "home", CLI, *given)
    assert (done.returncode, "adapter.gguf.README.md' exists already" in done.stderr) == (2, True)
    assert (card.read_text(), (adapter / "adapter.gguf").exists(), hub.repositories) == ("mine", False, {})


def test_export_pushes_file_and_card(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    given = ("export", adapter, "--to", "lora-gguf", "--push", "me/mine", "--public")
    done = call(hub, tmp_path / "home", CLI, *given)
    assert done.returncode == 0, done.stderr
    found = hub.repositories["me/mine"]
    assert not found.private
    assert found.files["adapter.gguf"] == (adapter / "adapter.gguf").read_bytes()
    assert b"A LoRA adapter as GGUF (f32)" in found.files["README.md"]
    assert not (adapter / "adapter.gguf.README.md").exists()
    done = call(hub, tmp_path / "home", CLI, "export", adapter, "--to", "adapter", "--push", "me/other")
    assert done.returncode == 0, done.stderr
    files = hub.repositories["me/other"].files
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files.keys()
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
