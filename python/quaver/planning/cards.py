"""Cards by name, and the links between them: the makers' stated figures, none of them measured."""

from __future__ import annotations

from ..errors import UsageError

__all__ = ["CARDS", "LINKS", "card", "link"]

GB = 10**9

# Memory in GB as NVIDIA's data sheets state it.
CARDS = {
    "t4": 16, "v100-16": 16, "v100-32": 32, "rtx3090": 24, "rtx4090": 24, "rtx5090": 32,
    "a10": 24, "l4": 24, "a6000": 48, "l40s": 48, "a100-40": 40, "a100-80": 80, "h100": 80,
    "h200": 141, "b200": 180,
}  # fmt: skip
ALIASES = {"3090": "rtx3090", "4090": "rtx4090", "5090": "rtx5090", "a100": "a100-80"}

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


def link(name: str) -> int:
    """The bytes that a card sends in a second over that link. UsageError for an unknown name."""
    if name not in LINKS:
        raise UsageError(f"plan: unknown link {name!r}; there are {', '.join(LINKS)}")
    return LINKS[name] * GB
