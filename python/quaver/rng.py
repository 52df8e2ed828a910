"""The random generators of the process as tensors and plain values."""

import random
import sys

import torch

__all__ = ["get_state", "set_state"]


def get_state():
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


def set_state(tensors, plain):
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
