"""Bytes that this rank sent, by kind: gradient, weight, activation, scale."""

from __future__ import annotations

_sent: dict[str, int] = {}


def count(kind: str, nbytes: int) -> None:
    """Book `nbytes` as sent."""
    _sent[kind] = _sent.get(kind, 0) + nbytes


def sent() -> dict[str, int]:
    """Bytes by kind since the last reset."""
    return dict(_sent)


def reset() -> None:
    _sent.clear()
