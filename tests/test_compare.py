"""Several models side by side: a column each, a refusal among them, and what does not go together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram import cli_requests
from tests.conftest import LLAMA_8B, QWEN2_7B
from tests.test_plan_page import TINY, _main

Toy = Callable[[dict[str, object]], Path]
Print = pytest.CaptureFixture[str]
WIDE = {"vocab_size": 152064, "hidden_size": 4096}  # two tables of 1.2 GB: too much for a card of 2 GB
SMALL = ("--seq-len", "512", "--vram", "2GB")


def _models(*folders: Path) -> list[str]:
    return [part for folder in folders for part in ("--model", str(folder))]


@pytest.fixture
def pair(config_only: Toy) -> tuple[Path, Path]:
    """One that fits a card of 2 GB and one that does not."""
    return config_only(QWEN2_7B | TINY), config_only(LLAMA_8B | TINY | WIDE)


def test_a_refusal_is_a_column(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: Print
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert _main(monkeypatch, "plan", *_models(*pair), *SMALL) == 0
    out, err = capsys.readouterr()
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in out.splitlines() if "│" in line}
    assert "fits" in rows["verdict"][0]
    assert "does not fit" in rows["verdict"][1]
    assert rows["reserved peak"][1].strip() == rows["longest on 8 GB"][1].strip() == "-"
    assert "tokens" in rows["longest on 8 GB"][0]
    assert rows["why not"][0].strip() == ""
    assert "budget" in " ".join(out.split())
    assert rows["nearest plan"][1].strip()
    assert "Error" not in err


def test_json_is_the_list_of_the_single_objects(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: Print
) -> None:
    assert _main(monkeypatch, "plan", *_models(*pair), *SMALL, "--json") == 0
    both = json.loads(capsys.readouterr().out)
    single = []
    for folder, code in zip(pair, (0, 3), strict=True):
        assert _main(monkeypatch, "plan", *_models(folder), *SMALL, "--json") == code
        single.append(json.loads(capsys.readouterr().out))
    assert [one["fits"] for one in both] == [True, False]
    for one in (*both, *single):  # what depends on the machine at that moment
        one.pop("device", None), one.pop("host_ram_bytes", None)
    assert both == single


def test_exit_code_3_when_none_fits(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: Print
) -> None:
    assert _main(monkeypatch, "plan", *_models(pair[1], pair[1]), *SMALL, "--json") == 3
    out, err = capsys.readouterr()
    assert [one["fits"] for one in json.loads(out)] == [False, False]
    assert "None of the 2 models fits" in err


@pytest.mark.parametrize(
    ("n", "more", "says"),
    [
        (2, ("--output", "plan.yaml"), "--output saves one plan"),
        (2, ("--html", "plan.html"), "--html saves one plan"),
        (5, (), "a table holds 4"),
    ],
)
def test_what_does_not_go_together(
    n: int,
    more: tuple[str, ...],
    says: str,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Print,
) -> None:
    monkeypatch.setattr(cli_requests, "planned", lambda *_, **__: pytest.fail("planned"))
    monkeypatch.chdir(tmp_path)
    assert _main(monkeypatch, "plan", *_models(*pair[:1] * n), *more) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("plan.*"))


def test_a_wrong_model_ends_the_command(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Print
) -> None:
    assert _main(monkeypatch, "plan", *_models(tmp_path / "none", pair[0]), *SMALL) == 2
    assert "There is no folder" in capsys.readouterr().err
