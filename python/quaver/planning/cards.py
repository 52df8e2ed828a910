"""Cards by name, and the links between them: the makers' stated figures, none of them measured."""

from __future__ import annotations

from ..errors import UsageError

__all__ = ["CARDS", "LINKS", "RATES", "card", "link", "rates"]

GB = 10**9

# Memory in GB as NVIDIA's data sheets state it.
CARDS = {
    "t4": 16, "v100-16": 16, "v100-32": 32, "rtx3090": 24, "rtx4090": 24, "rtx5090": 32,
    "a10": 24, "l4": 24, "a6000": 48, "l40s": 48, "a100-40": 40, "a100-80": 80, "h100": 80,
    "h200": 141, "b200": 180,
}  # fmt: skip
ALIASES = {"3090": "rtx3090", "4090": "rtx4090", "5090": "rtx5090", "a100": "a100-80"}

# TFLOP/s of dense products in bf16 and in FP8, and GB/s of memory, as the data sheets state them of
# the SXM cards; the A100 has no FP8 and multiplies it at bf16's rate.
RATES = {
    "a100-40": (312, 312, 1555), "a100-80": (312, 312, 2039), "l40s": (362, 733, 864),
    "h100": (989, 1979, 3350), "h200": (989, 1979, 4800), "b200": (2250, 4500, 8000),
}  # fmt: skip

# GB/s that one card sends, as stated: NVLink 3, 4 and 5 have 600, 900 and 1800 in both directions
# together, PCIe 4 and 5 x16 32 and 64 in each; InfiniBand HDR and NDR 200 and 400 Gbit/s a card.
LINKS = {
    "nvlink3": 300, "nvlink4": 450, "nvlink5": 900, "pcie4": 32, "pcie5": 64,
    "ib-hdr": 25, "ib-ndr": 50,
}  # fmt: skip


def card(name: str) -> int:
    """The bytes of a card's memory, 10^9 a GB. UsageError for an unknown name."""
    key = name.lower()
    key = ALIASES.get(key, key)
    if key not in CARDS:
        raise UsageError(f"plan: unknown GPU {name!r}; there are {', '.join(CARDS)}")
    return CARDS[key] * GB


def rates(name: str) -> tuple[float, float, float]:
    """A card's operations a second in bf16 and in FP8, and the bytes a second of its memory.
    UsageError for a card without stated ones."""
    key = ALIASES.get(name.lower(), name.lower())
    if key not in RATES:
        raise UsageError(f"plan: no rates are stated of {name!r}; there are {', '.join(RATES)}")
    low, fp8, memory = RATES[key]
    return low * 1e12, fp8 * 1e12, memory * 1e9


def link(name: str) -> int:
    """The bytes that a card sends in a second over that link. UsageError for an unknown name."""
    if name not in LINKS:
        raise UsageError(f"plan: unknown link {name!r}; there are {', '.join(LINKS)}")
    return LINKS[name] * GB
