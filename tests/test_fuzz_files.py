"""Some hundred damaged files of a run's folder; `make fuzz-files` tries thousands."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "fuzz"))

from damage_files import fuzz


def test_no_damaged_file_is_taken_for_another():
    assert fuzz(300, seed=1) == []
