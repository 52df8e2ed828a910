"""FP8 training for PyTorch."""

from quaver._load import load

_C = load()
build_info = _C.build_info
__version__ = build_info()["version"]

__all__ = ["__version__", "build_info"]
