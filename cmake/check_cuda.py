"""Checks the machine code of the CUDA backend: every kernel is there for every architecture."""

import re
import subprocess
import sys


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(library, *archs):
    usage = run("cuobjdump", "--dump-resource-usage", library)
    kernels = {arch: set() for arch in archs}
    spills = []
    arch = None
    for line in usage.splitlines():
        if match := re.search(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
            kernels.setdefault(arch, set()).add(name)
        elif (match := re.search(r"LOCAL:(\d+)", line)) and int(match[1]):
            spills.append(f"{name} (sm_{arch}): {match[1]} bytes of local memory")
    everything = set().union(*kernels.values())
    problems = [
        f"sm_{arch} lacks {name}" for arch in archs for name in sorted(everything - kernels[arch])
    ]
    if not everything:
        problems.append("no kernel at all")
    for arch in archs:
        print(f"sm_{arch}: {len(kernels[arch])} kernels")
    for line in spills:
        print(f"note: {line}")
    if problems:
        sys.exit(f"{library}: " + "; ".join(problems))


if __name__ == "__main__":
    main(*sys.argv[1:])
