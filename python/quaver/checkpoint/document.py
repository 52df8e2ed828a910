"""The schema of a checkpoint's description, which lies beside its tensors."""

from __future__ import annotations

from collections.abc import Collection

from ..schema import Each, Maybe, SchemaError, check

FORMAT = "quaver checkpoint"
VERSION = 2
SUFFIXES = (".qdata", ".scale", ".amax")  # of the entries of a ScaledTensor
PLACES = ("host", "device")  # where a state's tensor lies

LAYOUT = {"dtype": str, "format": str, "grain": str, "block": int, "expand": bool}
OPTIMIZER = {
    "class": str,
    "recipe": Maybe(str),
    "groups": [[str]],
    "options": [Each(object)],
    "states": Each(Each(dict)),
}
DOCUMENT = {
    "scaled": Each(LAYOUT),
    "aliases": Each(str),
    "optimizer": Maybe(OPTIMIZER),
    "step": int,
    "extra": object,
}


def check_document(document: dict, entries: Collection[str]) -> dict:
    """Returns `document`, which describes the tensors called `entries`. Raises SchemaError naming
    a field that is missing or of the wrong type, or a described entry that is missing."""
    check(document, DOCUMENT, "description")
    if document["step"] < 0:
        raise SchemaError(f"description.step must be 0 or more, got {document['step']}")
    aliases = document["aliases"]
    for alias, name in aliases.items():
        if alias in entries or name not in entries:
            raise SchemaError(f"description.aliases: {alias} cannot stand for {name}")
    names = {*entries, *aliases}
    for name, layout in document["scaled"].items():
        if layout.keys() != LAYOUT.keys():
            raise SchemaError(f"description.scaled.{name} has unknown fields")
        for suffix in SUFFIXES[:2]:
            if name + suffix not in names:
                raise SchemaError(f"{name}{suffix} is missing")
    if document["optimizer"] is not None:
        _check_optimizer(document["optimizer"], document["scaled"], names)
    return document


def _check_optimizer(optimizer: dict, scaled: dict, names: Collection[str]) -> None:
    if len(optimizer["options"]) != len(optimizer["groups"]):
        raise SchemaError("description.optimizer: wanted one set of options for each group")
    states = optimizer["states"]
    for name in (name for group in optimizer["groups"] for name in group):
        if name not in states:
            raise SchemaError(f"description.optimizer.states lacks {name}")
        for key, entry in states[name].items():
            full = f"optimizer.{name}.{key}"
            if "value" not in entry and entry.get("tensor") not in PLACES:
                raise SchemaError(f"{full} is neither a value nor a tensor")
            if "tensor" in entry and full not in scaled and full not in names:
                raise SchemaError(f"{full} is missing")
