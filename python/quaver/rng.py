"""The random generators of the process as tensors and plain values."""

from __future__ import annotations

import math
import random
import struct
import sys

import torch
from torch import Tensor

from .schema import Maybe, SchemaError, check

__all__ = ["check_state", "get_state", "set_state"]

WORDS = 624  # of the state of a Mersenne twister
PLAIN = {"python": [object]}
PYTHON = (int, [int], Maybe(float))  # version, words and position, spare gaussian
NUMPY = (str, [int], int, int, float)  # kind, words, position, has a spare gaussian, spare gaussian


def get_state() -> tuple[dict[str, Tensor], dict]:
    """({name: uint8 tensor}, JSON-able dict): torch's generators, and those of Python and NumPy."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        for i, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda{i}"] = state
    plain = {"python": random.getstate()}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        plain["numpy"] = [kind, keys.tolist(), *rest]
    return tensors, plain


def check_state(tensors: dict[str, Tensor], plain: dict) -> None:
    """Raises ValueError naming the first generator whose state `set_state` cannot take. (Some
    generators would take it, and read outside of their memory at the next draw.)"""
    if "torch" not in tensors:
        raise SchemaError("random generators: torch's is missing")
    for name, state in tensors.items():
        if state.dtype != torch.uint8 or state.dim() != 1:
            raise SchemaError(f"random generator {name}: wanted bytes, got {state.dtype}")
    _check_torch(tensors["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in tensors:
            _try(f"cuda{i}", torch.Generator(f"cuda:{i}").set_state, tensors[f"cuda{i}"])
    check(plain, PLAIN, "random")
    _check_python(plain["python"])
    if "numpy" in plain:
        _check_numpy(plain["numpy"])


def _try(name: str, function, state) -> None:
    try:
        function(state)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise SchemaError(f"random generator {name}: {str(error).splitlines()[0]}") from None


def _check_fields(name: str, state: list, fields: tuple) -> None:
    check(state, [object], f"random.{name}")
    if len(state) != len(fields):
        raise SchemaError(f"random.{name} has {len(state)} values, wanted {len(fields)}")
    for i, (value, schema) in enumerate(zip(state, fields, strict=True)):
        check(value, schema, f"random.{name}[{i}]")


def _check_words(name: str, words: list[int], position: int) -> None:
    if len(words) != WORDS or not all(0 <= word < 1 << 32 for word in words):
        raise SchemaError(f"random.{name}: wanted {WORDS} words of 32 bits")
    if not 0 <= position <= WORDS:
        raise SchemaError(f"random.{name}: position {position}, wanted 0 to {WORDS}")


def _check_torch(state: Tensor) -> None:
    _try("torch", torch.Generator().set_state, state)
    # The CPU generator's state is seed, words left, seeded, next word; torch does not check the
    # bounds of the two counts together.
    left, _, position = struct.unpack("<iiq", bytes(state[8:24].tolist()))
    if not 0 <= position <= WORDS or (left > 1 and left + position > WORDS + 1):
        raise SchemaError(f"random generator torch: word {position} of {WORDS}, {left} left")


def _check_python(state: list) -> None:
    _check_fields("python", state, PYTHON)
    version, words, gauss = state
    if not words:
        raise SchemaError("random.python: no words")
    _check_words("python", words[:-1], words[-1])
    _try("python", random.Random().setstate, (version, tuple(words), gauss))


def _check_numpy(state: list) -> None:
    _check_fields("numpy", state, NUMPY)
    kind, words, position, has_gauss, gauss = state
    if kind != "MT19937" or has_gauss not in (0, 1) or not math.isfinite(gauss):
        raise SchemaError(f"random.numpy: {kind} with {has_gauss} spare gaussian, {gauss}")
    _check_words("numpy", words, position)


def set_state(tensors: dict[str, Tensor], plain: dict) -> None:
    """Puts back what `get_state` gave. CUDA devices that are not here are passed over."""
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in plain and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(tuple(plain["numpy"]))
