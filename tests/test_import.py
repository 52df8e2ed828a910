"""`import quaver` brings torch and what a loop on one device needs, and no more."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys, time
start = time.process_time()
import torch
before, middle = set(sys.modules), time.process_time()
import quaver
print(middle - start, time.process_time() - middle, *sorted({*sys.modules} - before))
"""


def test_import_is_light():
    """By counts; the milliseconds are bench/bench_import.py's."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True, text=True)
    torchs, ours, *modules = done.stdout.split()
    tops = {name.partition(".")[0] for name in modules}
    assert tops - sys.stdlib_module_names == {"quaver"}
    later = ("quaver.distributed", "quaver.planning", "quaver.tune", "quaver.train", "quaver.cli")
    assert [name for name in modules if name.startswith(later)] == []
    assert len(modules) <= 100
    assert float(ours) < 0.5 * float(torchs)  # 0.05 where the bytecode is compiled already


def test_what_is_imported_later_is_there():
    import quaver as qv

    assert {*qv.__all__} <= {*dir(qv)}
    assert qv.distributed.ddp and qv.plan and qv.side_tune and qv.load_pretrained


@pytest.mark.parametrize(
    ("modules", "chosen", "spins"),
    [
        ("quaver, torch", {}, "1000"),
        ("torch, quaver", {}, "None"),  # libgomp has read it
        ("quaver", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("quaver", {"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_threads_spin_briefly_unless_someone_chose(modules, chosen, spins):
    variables = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    env = {k: v for k, v in os.environ.items() if k not in variables} | chosen
    code = f"import os, {modules}; print(os.environ.get('GOMP_SPINCOUNT'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, check=True, text=True)
    assert done.stdout.strip() == spins
