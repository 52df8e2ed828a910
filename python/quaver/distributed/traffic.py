"""Bytes that this rank sent, by kind."""

KINDS = ("gradient", "weight", "activation", "scale")
_sent = dict.fromkeys(KINDS, 0)


def count(kind: str, nbytes: int) -> None:
    _sent[kind] += nbytes


def sent() -> dict[str, int]:
    return dict(_sent)
