"""Writes the PTX that object files of nvcc hold, one file each, into a folder.

python cmake/extract_ptx.py cuobjdump FOLDER gemm_sm90_*.cu.o
"""

import subprocess
import sys
from pathlib import Path


def main(cuobjdump, folder, *objects):
    for path in map(Path, objects):
        shown = subprocess.run(
            [cuobjdump, "--dump-ptx", path], check=True, capture_output=True, text=True
        ).stdout
        start = shown.find(".version")
        if start < 0:
            sys.exit(f"{path} holds no PTX; cuobjdump shows: {shown[:300]!r}")
        text = shown[start:].partition("\nFatbin ")[0]
        (Path(folder) / path.name.replace(".cu.o", ".ptx")).write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
