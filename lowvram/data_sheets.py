"""Data sheets of GPUs: matrix products, memory and bus of those that train, found by the name they report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# GB/s of one lane, one way: 8, 16 and 32 GT/s in 128b/130b code (the specifications of PCIe 3.0 to 5.0).
_PCIE_LANE = {3: 0.985, 4: 1.969, 5: 3.938}
# A laptop's card is its namesake's chip, or a smaller one, at half the power or less. Where the rows below
# have both, the laptop's has 0.37 (RTX 5090) to 0.86 (RTX 3060) of the arithmetic, 0.6 in the mean.
LAPTOP_SHARE = 0.6
_LAPTOP_MARKS = (" laptop ", " max q ")


class Sheet(NamedTuple):
    """Peak figures of a data sheet."""

    teraflops: float  # dense 16-bit matrix products with float32 accumulation, 10^12 FLOP/s
    memory: float  # GB/s
    bus: float  # GB/s, host to device, in a slot of the card's own generation


def _sheet(teraflops: float, memory: float, generation: int, lanes: int) -> Sheet:
    return Sheet(teraflops, memory, _PCIE_LANE[generation] * lanes)


# NVIDIA's architecture papers (Turing, Ampere GA102, Ada, RTX Blackwell) and product pages. GeForce cards
# accumulate in float32 at half of the advertised rate, which is with float16 accumulation (from Ampere on
# with sparsity as well); workstation and data centre cards at the whole one. A laptop's card: at the boost
# clock of about its middle power. Where a name was sold with several memories (RTX 3050, A100): a usual one.
NVIDIA: Mapping[str, Sheet] = {
    "GTX 1650": _sheet(6.0, 128, 3, 16),  # no tensor cores
    "GTX 1660": _sheet(10.0, 192, 3, 16),
    "RTX 2060": _sheet(25.8, 336, 3, 16),
    "RTX 2060 SUPER": _sheet(28.7, 448, 3, 16),
    "RTX 2070": _sheet(29.9, 448, 3, 16),
    "RTX 2070 SUPER": _sheet(36.3, 448, 3, 16),
    "RTX 2080": _sheet(40.3, 448, 3, 16),
    "RTX 2080 SUPER": _sheet(44.6, 496, 3, 16),
    "RTX 2080 Ti": _sheet(53.8, 616, 3, 16),
    "TITAN RTX": _sheet(130.5, 672, 3, 16),
    "RTX 3050": _sheet(18.2, 224, 4, 8),
    "RTX 3060": _sheet(25.5, 360, 4, 16),
    "RTX 3060 Ti": _sheet(32.4, 448, 4, 16),
    "RTX 3070": _sheet(40.6, 448, 4, 16),
    "RTX 3070 Ti": _sheet(43.5, 608, 4, 16),
    "RTX 3080": _sheet(59.5, 760, 4, 16),
    "RTX 3080 Ti": _sheet(68.2, 912, 4, 16),
    "RTX 3090": _sheet(71.2, 936, 4, 16),
    "RTX 3090 Ti": _sheet(80.0, 1008, 4, 16),
    "RTX 3050 Laptop": _sheet(12.3, 192, 4, 8),
    "RTX 3050 Ti Laptop": _sheet(15.2, 192, 4, 8),
    "RTX 3060 Laptop": _sheet(21.9, 336, 4, 8),
    "RTX 3070 Laptop": _sheet(31.9, 448, 4, 8),
    "RTX 3070 Ti Laptop": _sheet(33.2, 448, 4, 8),
    "RTX 3080 Laptop": _sheet(38.0, 448, 4, 8),
    "RTX 3080 Ti Laptop": _sheet(37.4, 512, 4, 8),
    "RTX 4060": _sheet(30.2, 272, 4, 8),
    "RTX 4060 Ti": _sheet(44.1, 288, 4, 8),
    "RTX 4070": _sheet(58.3, 504, 4, 16),
    "RTX 4070 SUPER": _sheet(71.0, 504, 4, 16),
    "RTX 4070 Ti": _sheet(80.2, 504, 4, 16),
    "RTX 4070 Ti SUPER": _sheet(88.2, 672, 4, 16),
    "RTX 4080": _sheet(97.5, 717, 4, 16),
    "RTX 4080 SUPER": _sheet(104.4, 736, 4, 16),
    "RTX 4090": _sheet(165.2, 1008, 4, 16),
    "RTX 4090 D": _sheet(147.1, 1008, 4, 16),
    "RTX 4050 Laptop": _sheet(18.0, 192, 4, 8),
    "RTX 4060 Laptop": _sheet(23.2, 256, 4, 8),
    "RTX 4070 Laptop": _sheet(31.2, 256, 4, 8),
    "RTX 4080 Laptop": _sheet(49.4, 432, 4, 16),
    "RTX 4090 Laptop": _sheet(66.0, 576, 4, 16),
    "RTX 5050": _sheet(26.3, 320, 5, 8),
    "RTX 5060": _sheet(38.4, 448, 5, 8),
    "RTX 5060 Ti": _sheet(47.4, 448, 5, 8),
    "RTX 5070": _sheet(61.7, 672, 5, 16),
    "RTX 5070 Ti": _sheet(87.9, 896, 5, 16),
    "RTX 5080": _sheet(112.6, 960, 5, 16),
    "RTX 5090": _sheet(209.5, 1792, 5, 16),
    "RTX 5050 Laptop": _sheet(19.5, 384, 5, 8),
    "RTX 5060 Laptop": _sheet(25.3, 384, 5, 8),
    "RTX 5070 Laptop": _sheet(35.0, 384, 5, 8),
    "RTX 5070 Ti Laptop": _sheet(42.4, 672, 5, 8),
    "RTX 5080 Laptop": _sheet(58.4, 896, 5, 16),
    "RTX 5090 Laptop": _sheet(77.7, 896, 5, 16),
    "Quadro RTX 4000": _sheet(57.0, 416, 3, 16),
    "Quadro RTX 5000": _sheet(89.2, 448, 3, 16),
    "Quadro RTX 6000": _sheet(130.5, 672, 3, 16),
    "Quadro RTX 8000": _sheet(130.5, 672, 3, 16),
    "A2": _sheet(18.0, 200, 4, 8),
    "A10": _sheet(125.0, 600, 4, 16),
    "A10G": _sheet(70.0, 600, 4, 16),
    "A30": _sheet(165.0, 933, 4, 16),
    "A40": _sheet(149.7, 696, 4, 16),
    "A100": _sheet(312.0, 1555, 4, 16),
    "A2000": _sheet(32.0, 288, 4, 16),
    "A4000": _sheet(76.7, 448, 4, 16),
    "A4500": _sheet(94.6, 640, 4, 16),
    "A5000": _sheet(111.1, 768, 4, 16),
    "A5500": _sheet(136.4, 768, 4, 16),
    "A6000": _sheet(154.8, 768, 4, 16),
    "RTX 2000 Ada": _sheet(48.0, 224, 4, 8),
    "RTX 4000 Ada": _sheet(106.8, 360, 4, 16),
    "RTX 4000 SFF Ada": _sheet(76.8, 280, 4, 16),
    "RTX 4500 Ada": _sheet(158.4, 432, 4, 16),
    "RTX 5000 Ada": _sheet(261.0, 576, 4, 16),
    "RTX 6000 Ada": _sheet(364.2, 960, 4, 16),
    "L4": _sheet(121.0, 300, 4, 16),
    "L40": _sheet(181.0, 864, 4, 16),
    "L40S": _sheet(362.0, 864, 4, 16),
    "RTX PRO 6000 Blackwell": _sheet(503.8, 1792, 5, 16),
    "RTX PRO 6000 Blackwell Max-Q": _sheet(438.0, 1792, 5, 16),
    # 65 at a boost clock that its 70 W do not hold: one product after the other reaches 24, as other cards do
    # of 30 (forums.developer.nvidia.com/t/about-gpu-peak-performance/264462)
    "T4": _sheet(30.0, 320, 3, 16),
    "V100": _sheet(112.0, 900, 3, 16),
    "H100": _sheet(989.0, 3350, 5, 16),
    "H100 PCIe": _sheet(756.0, 2000, 5, 16),
    "H200": _sheet(989.0, 4800, 5, 16),
    "GH200": _sheet(989.0, 4000, 5, 16),
    "B200": _sheet(2250.0, 8000, 5, 16),
}
# From this compute capability on, and nothing else known: a small card of that generation.
BY_CAPABILITY = (
    ((12, 0), "RTX 5060"),
    ((9, 0), "H100 PCIe"),
    ((8, 9), "RTX 4060"),
    ((8, 6), "RTX 3060"),
    ((8, 0), "A30"),
    ((7, 5), "RTX 2060"),
    ((7, 0), "V100"),
    ((0, 0), "GTX 1650"),  # before Volta nothing has tensor cores
)
# AMD's product pages: float16 by matrix cores; of a card of two dies, the one that torch sees.
AMD: Mapping[str, Sheet] = {
    "RX 7600": _sheet(43.5, 288, 4, 8),
    "RX 7800 XT": _sheet(74.6, 624, 4, 16),
    "RX 7900 XT": _sheet(103.0, 800, 4, 16),
    "RX 7900 XTX": _sheet(122.8, 960, 4, 16),
    "RX 9060 XT": _sheet(103.0, 320, 5, 16),
    "RX 9070": _sheet(145.0, 640, 5, 16),
    "RX 9070 XT": _sheet(195.0, 640, 5, 16),
    "MI100": _sheet(92.3, 1228, 4, 16),
    "MI210": _sheet(181.0, 1638, 4, 16),
    "MI250X": _sheet(191.5, 1638, 4, 16),
    "MI300X": _sheet(1307.0, 5300, 5, 16),
}
# Intel's product pages: half of the INT8 figure of the XMX engines.
INTEL: Mapping[str, Sheet] = {
    "A380": _sheet(33.0, 186, 4, 8),
    "A750": _sheet(114.5, 512, 4, 16),
    "A770": _sheet(131.0, 560, 4, 16),
    "B580": _sheet(116.5, 456, 4, 8),
}
# Apple tells memory only; arithmetic is that of the M1 generation, the slowest. What is shared needs no bus.
APPLE: Mapping[str, Sheet] = {
    "M1": Sheet(2.6, 68, 68),
    "Pro": Sheet(5.2, 150, 150),
    "Max": Sheet(10.4, 300, 300),
    "Ultra": Sheet(20.8, 800, 800),
}


def find(name: str, sheets: Mapping[str, Sheet]) -> tuple[str, Sheet] | None:
    """The row whose words stand together in a device's `name`, the longest of them: "4070 Ti" before "4070".

    A laptop's card without a row of its own has `LAPTOP_SHARE` of its namesake's arithmetic.
    """
    told = _words(name)
    found = max((row for row in sheets if _words(row) in told), key=len, default=None)
    if found is None:
        return None
    sheet = sheets[found]
    if any(mark in told and mark not in _words(found) for mark in _LAPTOP_MARKS):
        return f"{found} in a laptop", sheet._replace(teraflops=LAPTOP_SHARE * sheet.teraflops)
    return found, sheet


def _words(name: str) -> str:
    """ " nvidia a100 sxm4 80gb " of "NVIDIA A100-SXM4-80GB": whole words only, so that A10 is not in A100."""
    return f" {' '.join(name.lower().replace('-', ' ').replace('/', ' ').split())} "
