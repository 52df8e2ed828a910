"""Schemas of JSON documents, as data, and the check that a document fits one."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass

__all__ = ["Each", "Maybe", "SchemaError", "check", "parse", "with_crc32", "without_crc32"]


class SchemaError(ValueError):
    """Text that is not JSON, or a document that lacks or mistypes a value; it names which."""


@dataclass(frozen=True)
class Each:
    """An object of any keys whose values are all of one schema."""

    schema: object


@dataclass(frozen=True)
class Maybe:
    """A value of a schema, or null."""

    schema: object


NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number",
         float: "a number", bool: "true or false"}  # fmt: skip


def check(value, schema, where: str) -> None:
    """Raises SchemaError naming the first place, below `where`, where `value` is not of `schema`:
    a type of NAMES (a whole number is a number, true and false are neither), {key: schema} for an
    object that has at least these keys, [schema] for a list of any length, Each, Maybe, or `object`
    for any value."""
    if isinstance(schema, Maybe):
        if value is not None:
            check(value, schema.schema, where)
    elif isinstance(schema, Each):
        check(value, dict, where)
        for key, item in value.items():
            check(item, schema.schema, f"{where}.{key}")
    elif isinstance(schema, dict):
        check(value, dict, where)
        for key, inner in schema.items():
            if key not in value:
                raise SchemaError(f"{where} lacks {key}")
            check(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        check(value, list, where)
        for i, item in enumerate(value):
            check(item, schema[0], f"{where}[{i}]")
    elif schema is not object:
        kinds = (int, float) if schema is float else schema
        if not isinstance(value, kinds) or (isinstance(value, bool) and schema is not bool):
            raise SchemaError(f"{where} must be {NAMES[schema]}, got {_shown(value)}")


def _shown(value) -> str:
    if isinstance(value, (dict, list)):
        return NAMES[type(value)]
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def parse(text: str, unique: bool = False):
    """The value of a JSON text; with `unique` a key may not come twice in an object. Raises
    SchemaError for any text that is not such, however deep."""
    try:
        return json.loads(text, object_pairs_hook=_once if unique else None)
    except RecursionError:
        raise SchemaError("JSON nested too deep") from None
    except SchemaError:
        raise
    except ValueError as error:
        raise SchemaError(f"no JSON: {error}") from None


def _once(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise SchemaError("a key comes twice")
    return found


def _crc32(document: dict) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def with_crc32(document: dict) -> dict:
    """`document` with a checksum of itself as "crc32"."""
    document.pop("crc32", None)
    document["crc32"] = _crc32(document)
    return document


def without_crc32(document: dict) -> dict:
    """Removes the checksum; SchemaError where it does not match."""
    check(document, {"crc32": int}, "document")
    if document.pop("crc32") != _crc32(document):
        raise SchemaError("its checksum does not match")
    return document
