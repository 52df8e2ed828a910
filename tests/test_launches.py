"""The CUDA backend's host code, run on the host with its kernels: the CPU's results, and no more
launches than before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from launch_cases import results

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "build/release/launches/libquaver.so"
pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="launches/libquaver.so is not built: `make test` builds it"
)


def run(*command):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_count_has_grown():
    run(ROOT / "bench/bench_launches.py", "--check")


def test_a_layer_with_scales_of_blocks_decodes_nothing():
    layer = run(ROOT / "bench/bench_launches.py", "--ops", "blockwise").partition("Llama block")[0]
    assert "3  quaver gemm" in layer and "dequantize" not in layer and "aten mm" not in layer


def test_results_are_the_cpus(tmp_path):
    run(ROOT / "tests/launch_cases.py", tmp_path / "results.pt")
    got, wanted = torch.load(tmp_path / "results.pt"), results()
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        for a, b in zip(got[name], values, strict=True):
            if a is None or b is None:
                assert a is b
            elif name.startswith("products"):  # sums in another order; one rounding to bf16 or e4m3
                torch.testing.assert_close(a.float(), b.float(), rtol=0.13, atol=0.13)
            else:
                assert_same(a, b)
