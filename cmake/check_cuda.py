"""Checks the machine code of the CUDA backend and prints what each kernel uses.

Every kernel must exist for every architecture (Hopper's matrix products: sm_90a only), and none may
spill, use local memory or have a stack. Every tactic of gemm must be there. Hopper's products must
be of FP8 and overlap: ptxas tells of those that it serialised (C7508, C7510, C7511) as information
only, which no flag makes an error, but the machine code shows them. Products by mma.sync must be of
FP8 on sm_89 and sm_120, and of codes unpacked to f16 on sm_90 and sm_100.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

GEMM_ARCH = "90a"
CSRC = Path(__file__).resolve().parents[1] / "csrc"
# The tensor core's instruction that ptxas makes of an FP8 mma.sync.
MMA = {"89": "QMMA", "90a": "HMMA", "100": "HMMA", "120": "QMMA"}


def run(*command, text=None):
    return subprocess.run(command, check=True, capture_output=True, text=True, input=text).stdout


def resources(library):
    """{(arch, function): {"REG": .., "SHARED": .., "STACK": .., "LOCAL": ..}}"""
    found, arch, name = {}, None, None
    for line in run("cuobjdump", "--dump-resource-usage", library).splitlines():
        if match := re.search(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            found[arch, name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


def instructions(library, arch):
    """{(arch, function): {opcode: count}}: local loads and stores, matrix products, and those of
    them that end a batch, which is waited for."""
    counts, name = defaultdict(lambda: defaultdict(int)), None
    command = ["cuobjdump", "--gpu-architecture", f"sm_{arch}", "--dump-sass", library]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as shown:
        for line in shown.stdout:
            if "Function : " in line:
                name = line.split(" : ")[1].strip()
            elif ("MMA" in line or "LDL" in line or "STL" in line) and (  # few of millions of lines
                match := re.search(r"\b(LDL|STL|QGMMA|HGMMA|QMMA|HMMA)\b", line)
            ):
                counts[arch, name][match[1]] += 1
                counts[arch, name]["BATCH"] += match[1] == "QGMMA" and "gsb0" in line
    if shown.returncode:
        raise subprocess.CalledProcessError(shown.returncode, command)
    return counts


def readable(names):
    """Demangled, without namespaces and parameters."""
    names = sorted(names)
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    lines = run("c++filt", text="\n".join(names)).splitlines()
    short = {}
    for name, line in zip(names, lines, strict=True):
        line = re.sub(r"\(anonymous namespace\)::|quaver::(cuda::)?|gemm_sm90::|^void ", "", line)
        short[name] = re.sub(r"\((bool|int|GemmOut)\)", "", line).split("(")[0]
    return short


def is_hopper(kernel):
    return re.search(r"(?<!grouped_)gemm_kernel", kernel) is not None


def is_mma(kernel):
    return "gemm_mma_kernel" in kernel or "grouped_gemm_kernel" in kernel


def main(library, *archs):
    usage, ops = resources(library), defaultdict(lambda: defaultdict(int))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for counts in pool.map(partial(instructions, library), {arch for arch, _ in usage}):
            ops.update(counts)
    names = {name for _, name in usage}
    short = readable(names)
    wanted = {
        name: [a for a in archs if a == GEMM_ARCH] if is_hopper(short[name]) else archs
        for name in names
    }
    problems = [
        f"sm_{arch} lacks {short[name]}"
        for name in sorted(names)
        for arch in wanted[name]
        if (arch, name) not in usage
    ]
    if not names:
        problems.append("no kernel at all")
    if GEMM_ARCH in archs:
        tactics = re.findall(r"X\((\w+),", (CSRC / "gemm_tactics.h").read_text())
        built = "".join(names)  # a mangled name holds the tactic's with its length before it
        problems += [f"no kernel for {t}" for t in tactics if f"{len(t)}{t}E" not in built]
    rows = re.findall(r"X\((\w+),", (CSRC / "gemm_mma_tactics.h").read_text())
    built = sum("gemm_mma_kernel" in name for name in names)
    if built != len(rows):
        problems.append(f"{built} kernels of mma.sync for {len(rows)} tactics")
    head = ("kernel", "sm", "regs", "shared", "local", "spills", "mma")
    row = "{:<60} {:>4} {:>5} {:>7} {:>6} {:>7} {:>6}"
    print(row.format(*head))
    for (arch, name), use in sorted(
        usage.items(), key=lambda item: (short[item[0][1]], item[0][0])
    ):
        op = ops[arch, name]
        local, spills = use["LOCAL"] + use["STACK"], op["LDL"] + op["STL"]
        products = sum(op[key] for key in ("QGMMA", "QMMA", "HMMA"))
        numbers = (use["REG"], use["SHARED"], local, spills, products)
        print(row.format(short[name][:60], arch, *numbers))
        where = f"{short[name]} (sm_{arch})"
        if local or spills:
            problems.append(f"{where}: {local} bytes of local memory, {spills} accesses to it")
        if is_hopper(short[name]) and not op["QGMMA"]:
            problems.append(f"{where}: no QGMMA")
        if is_mma(short[name]) and arch in MMA and not op[MMA[arch]]:
            problems.append(f"{where}: no {MMA[arch]}")
        if 2 * op["BATCH"] > op["QGMMA"]:
            problems.append(
                f"{where}: {op['BATCH']} of {op['QGMMA']} QGMMA are waited for, serialised"
            )
    for arch in archs:
        print(f"sm_{arch}: {sum(a == arch for a, _ in usage)} kernels")
    if problems:
        sys.exit(f"{library}:\n  " + "\n  ".join(problems))


if __name__ == "__main__":
    main(*sys.argv[1:])
