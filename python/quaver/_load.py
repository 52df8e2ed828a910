"""Loads libquaver.so, or raises one error that names the file and the remedy."""

import os
import sys
from pathlib import Path

MINIMUM_TORCH = (2, 11)
LIBRARY = Path(__file__).parent / "lib" / "libquaver.so"
SPINS = 1_000  # bench/bench_tokens.py: as fast as more alone, faster beside others


def spin_briefly() -> None:
    """Makes idle threads of libgomp, torch's on Linux, sleep after SPINS looks for work.

    By itself it looks 300,000 times, and a step has a thousand places to wait: beside other busy
    processes the threads that have work then do not run. libgomp reads its variables when torch
    loads it, so nothing happens where that was done, or where they are set."""
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if "torch" not in sys.modules and not chosen:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def load():
    """Import torch and then the native module, which registers `torch.ops.quaver`."""
    spin_briefly()
    try:
        # First, always: libquaver.so finds torch's libraries because they are loaded already.
        import torch
    except ImportError as error:
        raise ImportError(
            f"quaver needs torch >= 2.11, and torch does not import: {error}"
        ) from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MINIMUM_TORCH:
        raise ImportError(
            f"quaver needs torch >= 2.11, but {torch.__file__} is torch {torch.__version__}; "
            "install a newer torch"
        )
    try:
        from quaver import _C
    except ImportError as error:
        found = "exists" if LIBRARY.exists() else "does not exist"
        raise ImportError(
            f"quaver's native library does not load: {error}. "
            f"Looked for {LIBRARY} ({found}) and for quaver._C beside it, "
            f"with torch {torch.__version__}. "
            "In a source tree run `make`, or `pip install --no-build-isolation -e .`; "
            "otherwise reinstall a quaver wheel made for this Python version"
        ) from error
    return _C
