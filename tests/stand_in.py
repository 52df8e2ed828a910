"""The stand-in for NCCL (tests/cpp/nccl), which moves host memory between threads or processes."""

import os
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "build/release/tests/libnccl_stand_in.so"
built = pytest.mark.skipif(
    not PATH.exists(), reason=f"{PATH.name} is not built: `make test` builds it"
)


def carry(folder):
    """This process's Transports go through quaver's communicator; messages are files in `folder`,
    which must be the same on all ranks."""
    os.environ["QUAVER_COMMUNICATOR"] = "quaver"
    os.environ["QUAVER_NCCL_LIBRARY"] = str(PATH)
    os.environ["TMPDIR"] = str(folder)
