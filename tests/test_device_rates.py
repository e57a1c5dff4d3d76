"""Device rates: names and tables, imagined cards, the benchmark run on the CPU, and what is remembered."""

from __future__ import annotations

import gc
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram import data_sheets, device_rates
from lowvram.cache import rates_folder
from lowvram.data_sheets import AMD, APPLE, BY_CAPABILITY, INTEL, NVIDIA, find
from lowvram.device_rates import DeviceRates, known_rates, measured_rates, rates_of
from lowvram.hardware import Hardware, card_of_size
from lowvram.units import GiB
from tests.test_hardware import HOST

SOURCED = {  # TFLOP/s with float32 accumulation, without sparsity, and GB/s, of NVIDIA's architecture papers
    "RTX 2080 Ti": (53.8, 616),
    "RTX 3080": (59.5, 760),
    "RTX 3090": (71, 936),
    "RTX 4090": (165.2, 1008),
    "RTX 4080": (97.5, 717),
    "RTX 5090": (209.5, 1792),
    "A100": (312, 1555),
    "H100": (989.4, 3350),
}
# what the time model has assumed so far, as training reaches it
BEFORE = {"5090": 84e12, "4090": 66e12, "4070": 23e12, "4060": 12e12, "3090": 28e12, "3060": 10e12}


def gpu(name: str = "NVIDIA GeForce RTX 4060", **changes: Any) -> Hardware:
    told: dict[str, Any] = {
        "backend": "cuda",
        "name": name,
        "capability": (8, 9),
        "bf16": True,
        "driver": "580",
    }
    return Hardware(**{**dict(HOST), **told, "versions": {"torch": "2.13.0+cu130"}, **changes})


def numbers(rates: DeviceRates) -> tuple[float, float, float]:
    return rates.flops, rates.memory_bytes_per_second, rates.host_bytes_per_second


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))


# --- names and tables ---


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA GeForce RTX 4070", "RTX 4070"),
        ("NVIDIA GeForce RTX 4070 Ti", "RTX 4070 Ti"),
        ("NVIDIA GeForce RTX 4070 SUPER", "RTX 4070 SUPER"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "RTX 4070 Laptop"),
        ("NVIDIA GeForce RTX 3080 Ti Laptop GPU", "RTX 3080 Ti Laptop"),
        ("NVIDIA GeForce RTX 2070 with Max-Q Design", "RTX 2070 in a laptop"),
        ("NVIDIA RTX A2000 8GB Laptop GPU", "A2000 in a laptop"),
        ("NVIDIA RTX A2000 12GB", "A2000"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("Quadro RTX 6000", "Quadro RTX 6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell Max-Q"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
    ],
)
def test_names_find_their_row(name: str, row: str) -> None:
    assert rates_of(gpu(name)).source == f"data sheet of {row}"


@pytest.mark.parametrize(
    "name", ["NVIDIA T400", "NVIDIA GeForce GTX 1080 Ti", "NVIDIA A1000", "Tesla P40", ""]
)
def test_other_names_find_nothing(name: str) -> None:
    assert find(name, NVIDIA) is None


@pytest.mark.parametrize("sheets", [NVIDIA, AMD, INTEL, APPLE])
def test_every_row_is_sane(sheets: dict[str, data_sheets.Sheet]) -> None:
    for name, sheet in sheets.items():
        least = 1 if sheets is APPLE else 5
        assert least <= sheet.teraflops <= 2500, name
        assert 60 <= sheet.memory <= 8000, name
        assert 7 <= sheet.bus <= (sheet.memory if sheets is APPLE else 64), name
        # operations for each byte: a figure at float16 accumulation or with sparsity, or a slip, falls out
        assert 25 <= 1000 * sheet.teraflops / sheet.memory <= 460, name
        found = find(name, sheets)
        assert found is not None, name
        assert found[1] == sheet, f"{name} is hidden by {found[0]}"


@pytest.mark.parametrize("name", SOURCED)
def test_rows_are_the_data_sheets(name: str) -> None:
    assert (NVIDIA[name].teraflops, NVIDIA[name].memory) == pytest.approx(SOURCED[name], rel=0.01)


@pytest.mark.parametrize("name", BEFORE)
def test_rates_stay_about_what_the_time_model_had(name: str) -> None:
    assert rates_of(gpu(f"NVIDIA GeForce RTX {name}")).flops == pytest.approx(BEFORE[name], rel=0.05)


def test_a_laptop_is_slower_than_its_namesake() -> None:
    for name in NVIDIA:
        if not name.endswith("Laptop") and f"{name} Laptop" in NVIDIA:
            assert NVIDIA[f"{name} Laptop"].teraflops < NVIDIA[name].teraflops
    assert rates_of(gpu("NVIDIA RTX A2000 Laptop GPU")).flops < rates_of(gpu("NVIDIA RTX A2000")).flops


# --- what no name tells ---


@pytest.mark.parametrize(
    "capability", [(6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)]
)
def test_an_unknown_card_goes_by_its_capability(capability: tuple[int, int]) -> None:
    rates = rates_of(gpu("NVIDIA Graphics Device", capability=capability))
    assert rates.source == f"compute capability {capability[0]}.{capability[1]}"
    assert not rates.measured
    least = next(least for least, _ in BY_CAPABILITY if capability >= least)
    same = [rates_of(gpu(f"NVIDIA {name}")) for at, name in BY_CAPABILITY if at == least]
    assert [numbers(rates)] == [numbers(other) for other in same]


def test_an_unknown_card_without_a_capability_has_rates() -> None:
    assert rates_of(gpu("?", capability=None)).flops > 1e12


@pytest.mark.parametrize(
    ("backend", "name", "row"),
    [
        ("rocm", "AMD Radeon RX 7900 XTX", "RX 7900 XTX"),
        ("rocm", "AMD Instinct MI250X/MI250", "MI250X"),
        ("rocm", "AMD Radeon Graphics", "RX 7600"),
        ("xpu", "Intel(R) Arc(TM) A770 Graphics", "A770"),
        ("xpu", "Intel(R) Graphics", "A380"),
        ("mps", "Apple M2 Max", "Max"),
        ("mps", "Apple M4", "M1"),
        ("mps", "Apple GPU", "M1"),
    ],
)
def test_other_makes(backend: str, name: str, row: str) -> None:
    rates = rates_of(gpu(name, backend=backend))
    assert rates.source == f"data sheet of {row}"
    assert all(number > 1e9 for number in numbers(rates))


def test_cpu_goes_by_its_cores() -> None:
    plain, with_bf16 = rates_of(HOST), rates_of(gpu("CPU", backend="cpu", capability=None))
    assert (plain.flops, with_bf16.flops) == (8 * 3e10, 8 * 6e10)
    assert plain.memory_bytes_per_second == plain.host_bytes_per_second == 40e9
    assert known_rates(HOST) == plain
    assert not rates_folder().exists()


def test_a_larger_imagined_card_is_never_slower() -> None:
    sizes = [*range(1, 200), 7.5, 7.94, 10.8, 11.9, 15.6, 23.6, 31.4]
    cards = [numbers(rates_of(card_of_size(int(gib * GiB), HOST))) for gib in sorted(sizes)]
    for smaller, larger in pairwise(cards):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))
    assert len(set(cards)) >= 8


def test_imagined_cards_are_the_common_ones() -> None:
    eight = rates_of(card_of_size(8 * GiB, HOST))
    assert numbers(eight) == numbers(rates_of(gpu("NVIDIA GeForce RTX 4060")))
    assert eight.source == "common cards up to 8 GB"
    assert numbers(rates_of(card_of_size(24 * GiB, HOST))) == numbers(rates_of(gpu("RTX 3090")))
    twelve = rates_of(card_of_size(12 * GiB, HOST))
    assert numbers(twelve)[1:] == numbers(rates_of(gpu("RTX 3060")))[1:]


def test_an_imagined_card_is_never_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_rates, "measured_rates", pytest.fail)
    for host in (HOST, gpu(), gpu(backend="rocm")):
        card = card_of_size(8 * GiB, host)
        assert card.imagined
        assert not host.imagined
        assert known_rates(card) == rates_of(card)
    for backend in ("xpu", "mps"):
        other = gpu("unknown", backend=backend)
        assert known_rates(other) == rates_of(other)


def test_rates_must_be_numbers() -> None:
    good = rates_of(gpu()).model_dump()
    for bad in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="flops"):
            DeviceRates.model_validate(good | {"flops": bad})


# --- the benchmark, on the CPU ---


@pytest.mark.usefixtures("one_thread")  # the tables are for one core
@pytest.mark.parametrize("bf16", [False, True])
def test_benchmark_on_the_cpu(bf16: bool) -> None:
    here = gpu("CPU", backend="cpu", capability=None, bf16=bf16, cpu_count=1)
    rates = measured_rates(here, seconds=0.3, device="cpu")
    assert rates.measured
    assert rates.source.startswith("measured on this machine in ")
    for measured, told in zip(numbers(rates), numbers(rates_of(here)), strict=True):
        assert told / 30 <= measured <= told * 30
    assert rates.host_bytes_per_second == rates.memory_bytes_per_second


def test_benchmark_asks_for_a_twentieth_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small = gpu("CPU", backend="cpu", capability=None, total_bytes=64 << 20)
    live: list[int] = []

    def count(_: object, work: Any, amount: int) -> float:
        work()
        assert amount > 0
        gc.collect()
        tensors = {o.data_ptr(): o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor}
        live.append(sum(n_bytes for pointer, n_bytes in tensors.items() if pointer not in before))
        return 1e9

    before = {o.data_ptr() for o in gc.get_objects() if type(o) is torch.Tensor}
    monkeypatch.setattr(device_rates._Benchmark, "_rate", count)
    assert measured_rates(small, device="cpu").measured
    product, copy, host = live
    assert max(product, copy) <= 0.05 * small.total_bytes
    assert host <= 2 * 0.05 * small.total_bytes  # one half of which is the host's
    assert min(live) > 0


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError(), OSError()]
)
def test_a_benchmark_that_fails_leaves_the_table(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "mm", fail)
    assert measured_rates(HOST, 0.3, "cpu") == rates_of(HOST)


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:99"])
def test_a_device_that_is_not_there_leaves_the_table(device: str) -> None:
    assert measured_rates(gpu(), 0.3, device) == rates_of(gpu())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a benchmark on this GPU would not fail")
def test_a_failure_gives_the_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: given.append("device"))
    assert measured_rates(gpu(), 0.3) == rates_of(gpu())
    assert given == ["device"]


# --- what is remembered ---


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[DeviceRates]:
    """Each call of the benchmark, which finds a faster card each time."""
    made: list[DeviceRates] = []

    def measure(hardware: Hardware) -> DeviceRates:
        found = {"flops": 1e12 * (len(made) + 1), "measured": True, "source": "measured"}
        made.append(DeviceRates.model_validate(rates_of(hardware).model_dump() | found))
        return made[-1]

    monkeypatch.setattr(device_rates, "measured_rates", measure)
    return made


def test_a_card_is_measured_once(measurements: list[DeviceRates]) -> None:
    assert known_rates(gpu()) == known_rates(gpu()) == measurements[0]
    assert len(measurements) == 1
    assert len(list(rates_folder().iterdir())) == 1
    moved = gpu(free_bytes=1, held_bytes=2, host_free_bytes=3, disk_free_bytes=4)
    assert known_rates(moved) == measurements[0]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "NVIDIA GeForce RTX 4090"},
        {"total_bytes": 12 * GiB},
        {"driver": "590"},
        {"versions": {"torch": "2.14.0"}},
        {"backend": "rocm"},
    ],
)
def test_another_card_driver_or_torch_is_measured_anew(
    measurements: list[DeviceRates], change: dict[str, Any]
) -> None:
    assert known_rates(gpu()) != known_rates(gpu(**change))
    assert known_rates(gpu()) == measurements[0]
    assert len(measurements) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"flops": 1e12}', "\x00"])
def test_an_unreadable_file_is_measured_over(measurements: list[DeviceRates], content: str) -> None:
    known_rates(gpu())
    (file,) = rates_folder().iterdir()
    file.write_text(content)
    assert known_rates(gpu()) == known_rates(gpu()) == measurements[1]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("device",), ["1", "cuda", "other"]),
        (("rates", "flops"), -1),
        (("rates", "measured"), False),
        (("rates", "more"), 1),
    ],
)
def test_a_foreign_file_is_measured_over(
    measurements: list[DeviceRates], path: tuple[str, ...], value: object
) -> None:
    known_rates(gpu())
    (file,) = rates_folder().iterdir()
    content = json.loads(file.read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(content))
    assert known_rates(gpu()) == measurements[1]


def test_a_failure_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_rates, "measured_rates", rates_of)
    assert known_rates(gpu()) == rates_of(gpu())
    assert not rates_folder().exists()


def test_a_cache_that_cannot_be_written_costs_only_time(
    measurements: list[DeviceRates], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "file"))
    assert known_rates(gpu()) == measurements[0]
    assert known_rates(gpu()) == measurements[1]
