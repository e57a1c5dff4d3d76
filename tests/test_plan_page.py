"""The page of a plan: whole, escaped, without a request; and the files that `plan` saves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lowvram import cli, cli_requests, hardware, plan_chart, plan_page, planning
from lowvram.engine.source import ModelSource
from lowvram.planner.profiles import profile_for
from lowvram.planner.wishes import Wishes
from lowvram.planning import Planned
from lowvram.units import GiB, format_bytes
from tests.conftest import QWEN2_7B

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}
HOSTILE = "<script>alert('x')</script>&\"\x1b[31m"
_EMPTY = {"meta"}


class _Reader(HTMLParser):
    """Collects text, tags and attributes; an element that is not closed in its turn is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, css: str) -> int:
        return sum(name == tag and css in (a.get("class") or "").split() for name, a in self.tags)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(QWEN2_7B | TINY))
    card = hardware.card_of_size(8 * GiB, hardware.probe())
    wishes = Wishes(seq_len=512)
    return planning.plan_for(
        ModelSource(str(folder)), None, card, profile_for(card), wishes, lambda _: None, with_survey=True
    )


def test_it_parses_and_tells_everything(planned: Planned) -> None:
    read, plan = _Reader(plan_page.page(planned)), planned.plan
    assert planned.survey is not None
    for name, n_bytes in plan.estimate.components_bytes.items():
        assert name.replace("_", " ") + format_bytes(n_bytes) in read.text
    for said in (*plan.reasons, format_bytes(plan.host_ram_bytes), "LoRA, 16-bit", "nothing, it is here"):
        assert said in read.text
    cells = read.count("td", "yes") + read.count("td", "no")
    assert cells == len(planned.survey.cards) * len(planned.survey.lengths)
    assert read.count("line", "card") == len(planned.survey.cards)
    assert read.count("line", "need") == len(planned.survey.lengths) - 1
    full = planned.survey.full_fine_tuning_bytes
    assert full is not None
    assert "full fine-tuning" + format_bytes(full) in read.text


def test_it_asks_for_nothing(planned: Planned) -> None:
    html = plan_page.page(planned)
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img|\bsrc=|\bhref=", html)
    assert "prefers-color-scheme: dark" in html


def test_hostile_text_is_only_text(planned: Planned) -> None:
    device = planned.plan.device.model_copy(update={"name": f'"><b>{HOSTILE}'})
    told = {"model": HOSTILE, "data": HOSTILE, "reasons": (HOSTILE,), "device": device}
    html = plan_page.page(replace(planned, plan=planned.plan.model_copy(update=told)))
    read, plain = _Reader(html), _Reader(plan_page.page(planned))
    assert read.text.count("<script>alert('x')</script>&\"") >= 5  # title, heading, device, data, reason
    assert "\x1b" not in html
    grown = {tag for tag, _ in read.tags} - {tag for tag, _ in plain.tags}
    assert grown == set()


def test_full_fine_tuning_and_no_survey(planned: Planned) -> None:
    assert planned.survey is not None
    known = planned.survey.model_copy(update={"full_fine_tuning_bytes": 61 * GiB})
    assert "full fine-tuning61.00 GiB" in _Reader(plan_page.page(replace(planned, survey=known))).text
    alone = _Reader(plan_page.page(replace(planned, survey=None))).text
    assert "Context by card" not in alone
    empty = planned.survey.model_copy(update={"lengths": ()})
    assert "over context length" not in _Reader(plan_page.page(replace(planned, survey=empty))).text


@pytest.mark.parametrize("gib", [8, 1])
def test_the_bar_is_the_whole_card(planned: Planned, gib: int) -> None:
    """A card that is too small is marked in the bar instead."""
    device = planned.plan.device.model_copy(update={"total_bytes": gib * GiB})
    plan = planned.plan.model_copy(update={"device": device, "budget_bytes": (gib - 1) * GiB})
    read = _Reader(plan_chart.memory_bar(plan))
    widths = [float(str(a["width"]).rstrip("%")) for tag, a in read.tags if tag == "rect"]
    assert sum(widths) == pytest.approx(100, abs=0.1)
    fits = sum(part.n_bytes for part in plan_chart.segments(plan)) <= device.total_bytes
    assert fits is (gib == 8)
    assert read.count("line", "end") == (not fits)
    assert ("does not fit" in plan_page.page(replace(planned, plan=plan))) is (not fits)


def test_labels_of_cards_do_not_overlap(planned: Planned) -> None:
    assert planned.survey is not None
    read = _Reader(plan_chart.length_chart(planned.survey))
    at = [(float(str(a["x"])), float(str(a["y"]))) for tag, a in read.tags if a.get("class") == "cardname"]
    assert len(at) == len(planned.survey.cards)
    for i, (x, y) in enumerate(at):
        assert all(x != other_x or abs(y - other_y) >= 12 for other_x, other_y in at[i + 1 :])


def _main(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr("signal.signal", lambda *_: None)  # an error that is told shuts out Ctrl-C
    monkeypatch.setattr("sys.argv", ["lowvram", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli._run()
    return int(stopped.value.code or 0)


def test_the_command_writes_it(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    html, saved = tmp_path / "plan.html", tmp_path / "plan.yaml"
    common = ("plan", "--model", planned.plan.model, "--vram", "8GB", "--seq-len", "512", "--json")
    assert _main(monkeypatch, *common, "--html", html, "--output", saved) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["fits"] is True
    assert "Open it" in err
    assert "base weights" in _Reader(html.read_text(encoding="utf-8")).text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.html", "plan.yaml"]


def test_an_existing_file_is_refused_before_planning(
    config_only: Callable[[dict[str, object]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli_requests, "planned", lambda *_, **__: pytest.fail("planned"))
    html = tmp_path / "plan.html"
    html.write_text("mine")
    common = ("plan", "--model", config_only(QWEN2_7B))
    assert _main(monkeypatch, *common, "--html", html) == 2
    assert "Give another --html" in capsys.readouterr().err
    assert html.read_text() == "mine"
    new = tmp_path / "new"
    assert _main(monkeypatch, *common, "--html", new, "--output", new) == 2
    assert "same file" in capsys.readouterr().err
