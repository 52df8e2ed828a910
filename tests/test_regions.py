"""The parallel regions of a training step, counted where libgomp starts them (bench_regions.py)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import sys
sys.path.insert(0, {bench!r})
import bench_regions
sys.exit(not all(row["met"] for row in bench_regions.rows()))
"""


def test_a_step_opens_no_more_parallel_regions_than_bf16s():
    code = CODE.format(bench=str(ROOT / "bench"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
