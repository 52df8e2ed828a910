"""`import quaver` brings torch and what a loop on one device needs, and no more."""

import subprocess
import sys

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
