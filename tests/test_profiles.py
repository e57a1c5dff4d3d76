"""`lowvram profiles`: the list is the planner's choice, a copy is the profile, a bad file is explained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from lowvram.cli import app
from lowvram.errors import ConfigError
from lowvram.hardware import card_of_size
from lowvram.planner.profiles import load_profile, profile_for, shipped_profiles
from lowvram.units import GiB
from tests.test_hardware import HOST

ROOT = Path(__file__).parents[1] / "profiles"
NAMES = ["8gb", "12gb", "16gb", "24gb", "cpu"]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def profiles(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["profiles", *map(str, arguments)])


def refusal(*arguments: object) -> ConfigError:
    """Of a command; `main` prints it and exits with its code."""
    error = profiles(*arguments).exception
    assert isinstance(error, ConfigError), error
    assert error.exit_code == 2
    return error


# --- list ---


def test_list_shows_every_shipped_profile() -> None:
    done = profiles("list")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == NAMES
    for name, line in zip(NAMES, lines[1:6], strict=True):
        profile = load_profile(name)
        numbers = (profile.rank, profile.alpha, profile.learning_rate, profile.effective_batch)
        told = re.split(r"\s{2,}", line.strip())
        assert [float(text) for text in told[2:]] == list(numbers)
    assert lines[6] == f"Their files are in {ROOT}"


def test_list_in_json() -> None:
    told = json.loads(profiles("list", "--json").output)
    assert [entry["name"] for entry in told] == NAMES
    for entry in told:
        assert entry["rank"] == load_profile(entry["name"]).rank
        assert Path(entry["file"]).is_file()


@pytest.mark.parametrize("gib", [1, 8, 9.99, 10, 12, 14, 16, 19.99, 20, 24, 80])
def test_list_says_which_card_takes_which(gib: float) -> None:
    taken = profile_for(card_of_size(int(gib * GiB), HOST)).name
    cards = {entry["name"]: entry["cards"] for entry in json.loads(profiles("list", "--json").output)}
    assert [name for name, told in cards.items() if _takes(told, gib)] == [taken]
    assert profile_for(HOST).name == "cpu"
    assert cards["cpu"] == "no GPU"


def _takes(told: str, gib: float) -> bool:
    least = re.search(r"from (\S+)", told)
    below = re.search(r"below (\S+)", told)
    in_range = (not least or gib >= float(least[1])) and (not below or gib < float(below[1]))
    return bool(least or below) and in_range


# --- show and validate ---


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_the_profile(tmp_path: Path, name: str) -> None:
    done = profiles("show", name)
    assert done.exit_code == 0
    assert done.stdout_bytes == (ROOT / f"{name}.yaml").read_bytes()
    mine = tmp_path / "mine.yaml"
    mine.write_bytes(done.stdout_bytes)
    checked = profiles("validate", mine)
    assert checked.exit_code == 0
    assert f"{mine} is valid" in checked.output
    assert load_profile(str(mine)) == load_profile(name)
    assert profiles("show", mine).stdout_bytes == done.stdout_bytes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode(tmp_path: Path, encoding: str) -> None:
    """utf-16 is what PowerShell's > writes, utf-8-sig what Windows' editor has saved for long."""
    mine = tmp_path / "größe 😀 [bold].yaml"
    text = shipped_profiles()["8gb"].read_text(encoding="utf-8").replace("name: 8gb", "name: größe 😀")
    mine.write_bytes(text.encode(encoding))
    done = profiles("validate", mine)
    assert done.exit_code == 0, done.exception
    assert "größe 😀 [bold].yaml is valid" in done.output
    assert load_profile(str(mine)).name == "größe 😀"


def test_validate_names_everything_that_is_wrong(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    text = shipped_profiles()["8gb"].read_text(encoding="utf-8")
    for right, wrong in (
        ("\nrank: 4", "\nrnak: 4"),
        ("\nalpha: 16", "\nalpha: much"),
        ("\nepochs: 3", "\nepochs: 0"),
    ):
        assert right in text
        text = text.replace(right, wrong)
    mine.write_text(text + "größe: 1\n", encoding="utf-8")
    message = refusal("validate", mine).message
    for says in ("rnak: unknown key; did you mean rank?", "rank: Field required", "größe: unknown key"):
        assert says in message
    assert re.search(r"alpha: .*number.*\(got 'much'\)", message)
    assert re.search(r"epochs: .*greater than 0 \(got 0\)", message)
    assert message == refusal("show", mine).message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "There is no "),
        (b"", "holds nothing"),
        (b"- a\n", "holds a list"),
        (b"a: [", "cannot be read as YAML"),
        (b"\xff\xfe\xfd", "cannot be read as YAML"),
        (b"name: \x00", "cannot be read as YAML"),
        (b"!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
    ],
)
def test_validate_a_file_that_is_no_profile(tmp_path: Path, content: bytes | None, says: str) -> None:
    mine = tmp_path / "mine.yaml"
    if content is not None:
        mine.write_bytes(content)
    error = refusal("validate", mine)
    assert says in error.message
    assert str(mine) in error.message
    repair = "Repair" if "as YAML" in says else "lowvram profiles show 8gb > mine.yaml"
    assert repair in error.remedy


def test_validate_a_folder(tmp_path: Path) -> None:
    assert f"{tmp_path} cannot be read (Is a directory)" in refusal("validate", tmp_path).message


@pytest.mark.parametrize("name", ["9gb", "8GB", "", ".", "../profiles"])
def test_show_an_unknown_name(name: str) -> None:
    error = refusal("show", name)
    assert error.message == f"There is no profile '{name}'."
    assert error.remedy == f"Use {', '.join(NAMES)} or a YAML file."


def test_the_real_command_line(
    lowvram: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(lowvram("profiles", "show", "8gb").stdout.replace("\nrank:", "\nrnak:"))
    refused = lowvram("profiles", "validate", mine)
    assert refused.returncode == 2
    assert "did you mean rank?" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_commands_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom lowvram.cli import app\n"
        "assert CliRunner().invoke(app, ['profiles', 'list']).exit_code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
