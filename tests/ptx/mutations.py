"""Faults put into the kernels' PTX, each of which the tests on the interpreter must find.

    python tests/ptx/mutations.py build/cuda

A mutation edits one kernel's text and runs the test programs on it; a fault that no test or check
finds is an error. The programs must pass on the text as it is (`check_ptx` runs them).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple


class Mutation(NamedTuple):
    fault: str
    kernel: str  # file:part of the kernel's name
    pattern: str
    replacement: str
    tests: str  # program:filter
    found_by: str = ""  # what the output must say; otherwise a check of values fails
    number: int = 0  # of the matches in the kernel


CAST = "cast_transpose:cast_kernelINS_4bf16E"
BLOCKS = "cast_layouts:cast_blocks_kernelINS_4bf16ENS_4e4m3E"
TEST_BLOCKS = "test_cuda_cast_layouts:every_shape"
NORM = "normalize:normalize_rows_kernelINS_4bf16E"
TEST_CAST, TEST_QUANTIZE = "test_cuda_cast_transpose", "test_cuda_quantize"
TEST_NORM, TEST_ADAM = "test_cuda_normalize", "test_cuda_adam:low_precision"
TEST_MASTERS = "test_cuda_adam:masters_rounded"
TEST_EXPANDED = "test_cuda_adam:expanded_moments"
TEST_ADAM4 = "test_cuda_adam4:every_shape"
RACE = "a race: "
GEMM = "gemm_sm90_e4m3_e4m3_fast_half_128x256:gemm_kernel"
GEMM_HALVES = "gemm_sm90_e4m3_e4m3_half_128x256:gemm_kernel"
GEMM_BLOCKS = "gemm_sm90_e4m3_e4m3_blocks_f32_128x128:gemm_kernel"
TEST_LATE = "test_gemm:as_late_as_they_may_be"
MMA = "gemm_mma:gemm_mma_kernel"
MMA_FP8 = MMA + "INS0_9MmaTacticINS_4e4m3ES3_LNS_7GemmOutE2ELb0ELi64"
TEST_MMA = "test_cuda_gemm:ragged_shapes"
GROUPED = "grouped_gemm:grouped_gemm_kernel"
TEST_GROUPED = "test_cuda_grouped"
CAST_GROUPS = "cast_groups:cast_groups_kernelINS_4bf16E"
TEST_CAST_GROUPS = "test_cuda_cast_groups:rows_of_every_division"
TRY_WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 P1, [^;]*;"
STORE = r"(cp\.async\.bulk\.tensor\.3d\.global[^{]*\{)(%r\d+), (%r\d+),"

MUTATIONS = [
    Mutation("a barrier dropped: tile", CAST, r"bar\.sync[^;]*;", "", TEST_CAST, RACE, 4),
    Mutation("a barrier dropped: the pass", CAST, r"bar\.sync[^;]*;", "", TEST_CAST, RACE, 2),
    Mutation(
        "a barrier dropped: table", "nf4:encode", r"bar\.sync[^;]*;", "", "test_cuda_nf4", RACE
    ),
    *(
        Mutation(
            f"a barrier dropped: blocks, {n}", BLOCKS, r"bar\.sync[^;]*;", "", TEST_BLOCKS, RACE, n
        )
        for n in range(4)
    ),
    *(
        Mutation(
            f"a barrier dropped: blocks of a norm, {n}",
            "normalize:normalize_blocks_kernelINS_4bf16E",
            r"bar\.sync[^;]*;",
            "",
            "test_cuda_fused_layouts:every_kind",
            RACE,
            n,
        )
        for n in range(4)
    ),
    Mutation("a barrier under a predicate", CAST, r"(bar\.sync[^;]*;)", r"@%p1 \1", TEST_CAST),
    Mutation(
        "a stride that is added",
        CAST,
        r"mul\.lo\.s64 (\s*%rd\d+, %rd\d+), (%rd\d+)",
        r"add.s64 \1, \2",
        TEST_CAST,
        number=3,
    ),
    Mutation(
        "a store widened",
        CAST,
        r"st\.global\.u8 (\s*\[%rd\d+\+15\])",
        r"st.global.u16 \1",
        TEST_CAST,
    ),
    Mutation(
        "a store past the buffer",
        CAST,
        r"(st\.global\.v4\.u32 \s*\[%rd\d+)\]",
        r"\1+16]",
        TEST_CAST,
    ),
    Mutation(
        "a bound off by one",
        CAST,
        r"(setp\.lt\.s64 \s*%p\d+, %rd\d+), 16",
        r"\1, 15",
        TEST_CAST,
        number=3,  # of the transpose, whose edge a test has
    ),
    Mutation(
        "a predicate turned around", CAST, r"@(%p\d+) bra", r"@!\1 bra", TEST_CAST, number=292
    ),
    Mutation(
        "a misaligned vector",
        CAST,
        r"st\.global\.v4\.u32 (\s*\[%rd\d+)\]",
        r"st.global.v4.u32 \1+4]",
        TEST_CAST,
        "no multiple",
    ),
    Mutation("a wrong swizzle", CAST, r"xor\.b32", "or.b32", TEST_CAST, number=2),
    Mutation(
        "bytes permuted wrongly",
        CAST,
        r"prmt\.b32 (\s*%r\d+), (%r\d+), (%r\d+),",
        r"prmt.b32 \1, \3, \2,",
        TEST_CAST,
    ),
    Mutation(
        "bf16 rounds to zero",
        "nf4:decode_kernelINS_4bf16E",
        r"cvt\.rn\.bf16x2",
        "cvt.rz.bf16x2",
        "test_cuda_nf4",
    ),
    Mutation(
        "f16 rounds to zero",
        "quantize:quantize_tensor_kernelIfNS_3f16ELb0E",
        r"cvt\.rn\.satfinite\.f16x2",
        "cvt.rz.satfinite.f16x2",
        TEST_QUANTIZE,
    ),
    Mutation(
        "a maximum becomes a minimum",
        CAST,
        r"\bmax(\.u32 \s*%r\d+, %r\d+, %r\d+;)",
        r"min\1",
        TEST_CAST,
        number=20,
    ),
    Mutation(
        "a shuffle over a wrong distance",
        "normalize:normalize_rows_kernelIfE",
        r"(shfl\.sync\.bfly\.b32 [^,]*, %r\d+), %r\d+",
        r"\1, 3",
        TEST_NORM,
    ),
    Mutation(
        "a lane left out of a mask",
        NORM,
        r"(shfl\.sync\.bfly\.b32 [^;]*), %r\d+;",
        r"\1, 1;",
        TEST_NORM,
        "not in the mask",
    ),
    Mutation(
        "a product without its addend",
        "activate:activate_kernelINS_4bf16E",
        r"fma\.rn\.f32 (\s*%f\d+, %f\d+, [^,]*), [^;]*;",
        r"mul.rn.f32 \1;",
        "test_cuda_activate",
    ),
    Mutation(
        "a division turned around",
        "adam:update_kernel",
        r"div\.rn\.f32 (\s*%f\d+), ([^,]*), ([^;]*);",
        r"div.rn.f32 \1, \3, \2;",
        TEST_ADAM,
        number=59,  # of states with one scale: those of other kinds come before and behind
    ),
    Mutation(
        "noise that is rounded once more",
        "adam:update_kernel",
        r"cvt\.rz\.satfinite\.f16x2",
        "cvt.rn.satfinite.f16x2",
        TEST_MASTERS,
    ),
    *(
        Mutation(
            f"a small moment that is rounded up: {tests}",
            "adam:update_kernel",
            r"add\.rz\.f32",
            "add.rn.f32",
            tests,
            number=n,
        )
        for n, tests in ((0, TEST_EXPANDED), (16, TEST_MASTERS))
    ),
    Mutation(
        "a barrier dropped: logarithms",
        "adam:update_kernel",
        r"bar\.sync[^;]*;",
        "",
        TEST_EXPANDED,
        RACE,
        number=1,
    ),
    Mutation(
        "a group's largest moment that half of its threads miss",
        "adam:update_kernel",
        r"(shfl\.sync\.bfly\.b32 [^,]*, %r\d+), %r\d+",
        r"\1, 0",
        TEST_EXPANDED,
    ),
    Mutation(
        "fours of a norm that threads do not exchange",
        "grad_norm:piece_kernel",
        r"(shfl\.sync\.bfly\.b32 [^,]*, %r\d+), %r\d+",
        r"\1, 0",
        "test_cuda_grad:norm_that_its_order",
        number=16,  # the upper half of an f64
    ),
    Mutation(
        "halves that neighbours do not exchange",
        "adam4:update_kernel",
        r"(shfl\.sync\.bfly\.b32 [^,]*, %r\d+), %r\d+",
        r"\1, 0",
        "test_cuda_adam4",
    ),
    Mutation(
        "a barrier dropped: numbers of a panel",
        "adam4:update_kernel",
        r"bar\.sync[^;]*;",
        "",
        TEST_ADAM4,
        RACE,
    ),
    *(
        Mutation(
            f"a barrier dropped: maxima of a panel, {n}",
            "adam4:maxima_kernel",
            r"bar\.sync[^;]*;",
            "",
            TEST_ADAM4,
            RACE,
            n,
        )
        for n in range(2)
    ),
    Mutation(
        "a wrong swizzle: columns of a panel",
        "adam4:update_kernel",
        r"xor\.b32",
        "or.b32",
        TEST_ADAM4,
    ),
    Mutation(
        "a barrier dropped: weights of a norm's backward",
        "normalize_backward:normalize_backward_kept_kernelINS_4bf16ELi4E",
        r"bar\.sync[^;]*;",
        "",
        "test_cuda_normalize:long_rows",
        RACE,
    ),
    Mutation(
        "a barrier dropped: the amax of a tile",
        "quantize_tiles:quantize_tiles_kernelINS_4bf16ENS_4e4m3E",
        r"bar\.sync[^;]*;",
        "",
        "test_cuda_cast_layouts",
        RACE,
        number=2,
    ),
    Mutation(
        "what is no number taken for one",
        "adam:update_kernel",
        r"redux\.sync\.max\.u32 (%r\d+), [^;]*;",
        r"mov.u32 \1, 0;",
        TEST_EXPANDED,
    ),
    Mutation(
        "Philox with a wrong operation",
        "quantize:quantize_tensor_kernelINS_4bf16ENS_4e4m3ELb1E",
        r"xor\.b64",
        "or.b64",
        TEST_QUANTIZE,
        number=4,
    ),
    Mutation(
        "a choice swapped",
        "adam:begin_kernel",
        r"selp\.f64 (\s*%fd\d+), ([^,]*), ([^,]*),",
        r"selp.f64 \1, \3, \2,",
        TEST_ADAM,
    ),
    Mutation(
        "a rotation that never turns back",
        "rotate:rotate_kernelINS_4bf16E",
        r"selp\.f32 (\s*%f\d+), 0f3F800000, 0fBF800000",
        r"selp.f32 \1, 0f3F800000, 0f3F800000",
        "test_cuda_rotate",
    ),
    Mutation(
        "an update that is no atomic",
        "nf4:encode",
        r"atom\.shared\.max\.u32 \s*(%r\d+), (\[[^]]*\]), ([^;]*);",
        r"ld.shared.u32 \1, \2; st.shared.u32 \2, \3;",
        "test_cuda_nf4",
        RACE,
    ),
    Mutation(
        "a barrier dropped: sums", "grad_norm:total", r"bar\.sync[^;]*;", "", "test_cuda_grad", RACE
    ),
    Mutation(
        "a loop that never ends",
        "pack:pack_kernelINS_4e4m3E",
        r"setp\.gt\.s64 (\s*%p\d+, %rd\d+), 1;",
        r"setp.gt.s64 \1, -9;",
        "test_cuda_all_reduce",
        "limit of instructions",
    ),
    Mutation(
        "a barrier that half of the block waits for",
        "grad_norm:total",
        r"bar\.sync \s*0;",
        "bar.sync 0, 512;",
        "test_cuda_grad",
        "wait at line",
    ),
    Mutation(
        "a wait for products dropped",
        GEMM,
        r"wgmma\.wait_group\.sync\.aligned 0;",
        "",
        TEST_LATE,
        "an accumulator is touched",
    ),
    Mutation(
        "operands released before their product",
        GEMM,
        r"wgmma\.wait_group\.sync\.aligned 1;",
        "",
        TEST_LATE,
        RACE,
    ),
    Mutation(
        "a group of products not committed",
        GEMM,
        r"wgmma\.commit_group\.sync\.aligned;",
        "",
        TEST_LATE,
        RACE,
    ),
    Mutation(
        "a fence of accumulators dropped",
        GEMM,
        r"wgmma\.fence\.sync\.aligned;",
        "",
        TEST_LATE,
        "no wgmma.fence",
    ),
    Mutation(
        "a proxy fence dropped",
        GEMM,
        r"fence\.proxy\.async\.shared::cta;",
        "",
        TEST_LATE,
        "no fence.proxy.async",
    ),
    Mutation(
        "operands read before they land", GEMM, TRY_WAIT, "setp.eq.s32 P1, 0, 0;", TEST_LATE, RACE
    ),
    Mutation(
        "operands loaded before their stage is free",
        GEMM,
        TRY_WAIT,
        "setp.eq.s32 P1, 0, 0;",
        TEST_LATE,
        "more arrivals than",
        number=4,
    ),
    Mutation(
        "an arrival dropped",
        GEMM,
        r"mbarrier\.arrive\.shared::cluster\.b64 [^;]*;",
        "",
        TEST_LATE,
        "wait at line",
    ),
    Mutation(
        "fewer bytes expected than come",
        GEMM,
        r"(mbarrier\.arrive\.expect_tx\.[^,]*, \[%r\d+\]), %r\d+;",
        r"\1, 1024;",
        TEST_LATE,
        "wait at line",
    ),
    Mutation(
        "a multicast to one CTA",
        GEMM,
        r"(multicast::cluster[^;]*), %rs\d+,",
        r"\1, 1,",
        TEST_LATE,
    ),
    Mutation(
        "a stage of the output written while it is stored",
        GEMM,
        r"cp\.async\.bulk\.wait_group\.read 1;",
        "",
        TEST_LATE,
        RACE,
    ),
    Mutation(
        "a block that ends before its stores",
        GEMM,
        r"cp\.async\.bulk\.wait_group\.read 0;",
        "",
        TEST_LATE,
        "ends before copies",
    ),
    Mutation("a named barrier dropped", GEMM, r"bar\.sync [^;]*;", "", TEST_LATE, number=1),
    Mutation(
        "a cluster that does not wait for its mbarriers",
        GEMM,
        r"barrier\.cluster\.wait\.aligned;",
        "",
        "test_gemm:a_cta_of_a_cluster",
        "there is no mbarrier",
    ),
    Mutation("axes of a stored box swapped", GEMM, STORE, r"\1\3, \2,", TEST_LATE),
    Mutation(
        "a wrong stride in a matrix descriptor",
        GEMM,
        r"4611686293305360384",
        "4611686155866406912",
        TEST_LATE,
        number=1,
    ),
    Mutation("a wrong swizzle of the output", GEMM, r"xor\.b32", "or.b32", TEST_LATE, number=5),
    *(
        Mutation(
            f"a wait for products dropped: half {n} of a tile",
            GEMM_HALVES,
            r"wgmma\.wait_group\.sync\.aligned 0;",
            "",
            TEST_LATE,
            "an accumulator is touched",
            n,
        )
        for n in range(2)
    ),
    Mutation("a copy of scales dropped", GEMM_BLOCKS, r"cp\.async\.ca[^;]*;", "", TEST_LATE),
    Mutation(
        "scales of which no mbarrier is told",
        GEMM_BLOCKS,
        r"cp\.async\.mbarrier[^;]*;",
        "",
        TEST_LATE,
        "a block hangs",
    ),
    Mutation(
        "scales that are told of before they land",
        GEMM_BLOCKS,
        r"cp\.async\.mbarrier\.arrive\.noinc\.shared::cta\.b64",
        "mbarrier.arrive.shared::cta.b64 _,",
        TEST_LATE,
        "before the end of an asynchronous write",
    ),
    Mutation(
        "copies that are not waited for", MMA, r"cp\.async\.wait_group 1;", "", TEST_MMA, RACE
    ),
    Mutation(
        "a wait for one group too few",
        MMA,
        r"cp\.async\.wait_group 1;",
        "cp.async.wait_group 2;",
        TEST_MMA,
        RACE,
    ),
    Mutation("a barrier dropped: stages", MMA, r"bar\.sync[^;]*;", "", TEST_MMA, RACE),
    Mutation(
        "a group of copies not committed",
        MMA,
        r"cp\.async\.commit_group;",
        "",
        TEST_MMA,
        RACE,
        number=1,
    ),
    Mutation(
        "fragments swapped",
        MMA,
        r"(mma\.sync[^{]*\{[^}]*\}, \{)(%r\d+), (%r\d+),",
        r"\1\3, \2,",
        TEST_MMA,
        number=5,
    ),
    Mutation(
        "formats of a product swapped",
        MMA,
        r"(mma\.sync\.aligned\.m16n8k32\.row\.col\.f32)\.e4m3",
        r"\1.e5m2",
        TEST_MMA,
    ),
    Mutation(
        "a barrier dropped: stages of groups", GROUPED, r"bar\.sync[^;]*;", "", TEST_GROUPED, RACE
    ),
    Mutation(
        "a group's copy that reads outside and not inside",
        GROUPED,
        r"selp\.b32 (\s*%r\d+), 16, 0,",
        r"selp.b32 \1, 0, 16,",
        TEST_GROUPED,
    ),
    Mutation(
        "a barrier dropped: the scale of a group",
        CAST_GROUPS,
        r"bar\.sync[^;]*;",
        "",
        TEST_CAST_GROUPS,
        RACE,
        4,
    ),
    Mutation(
        "a group's amax of one lane",
        "cast_groups:measure_groups_kernelINS_4bf16E",
        r"redux\.sync\.max\.u32 (\s*%r\d+), (%r\d+), [^;]*;",
        r"mov.b32 \1, \2;",
        TEST_CAST_GROUPS,
    ),
    Mutation("a wrong swizzle of a stage", MMA, r"xor\.b32", "or.b32", TEST_MMA),
    Mutation(
        "a copy that reads outside and not inside",
        MMA,
        r"selp\.b32 (\s*%r\d+), 16, 0,",
        r"selp.b32 \1, 0, 16,",
        TEST_MMA,
    ),
    Mutation(
        "an amax of one lane",
        MMA_FP8,
        r"redux\.sync\.max\.u32 (\s*%r\d+), (%r\d+), [^;]*;",
        r"mov.b32 \1, \2;",
        TEST_MMA,
        "the amax is",
    ),
]


def mutated(text, m):
    """The module's text with the fault in one kernel."""
    name = m.kernel.partition(":")[2]
    start = re.search(rf"\.entry \S*{name}", text)
    if not start:
        sys.exit(f"mutations: {m.fault}: no kernel {m.kernel}")
    end = text.find(".entry", start.end())
    end = len(text) if end < 0 else end
    body = text[start.start() : end]
    found = list(re.finditer(m.pattern, body))
    if len(found) <= m.number:
        sys.exit(f"mutations: {m.fault}: {len(found)} places in {m.kernel} match {m.pattern}")
    at = found[m.number]
    body = body[: at.start()] + at.expand(m.replacement) + body[at.end() :]
    return text[: start.start()] + body + text[end:]


def run(build, folder, m):
    """Exit status and output of the tests on the PTX of `folder`."""
    program, _, tests = m.tests.partition(":")
    command = [build / "tests" / f"{program}_ptx", *([tests] if tests else [])]
    done = subprocess.run(
        command,
        env={**os.environ, "QUAVER_PTX_DIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout


def caught(build, m):
    """Whether the fault is found as it should be, and the first line that says so."""
    source = build / "ptx"
    changed = m.kernel.partition(":")[0] + ".ptx"
    with tempfile.TemporaryDirectory() as folder:
        for path in source.glob("*.ptx"):
            (Path(folder) / path.name).symlink_to(path)
        (Path(folder) / changed).unlink()
        (Path(folder) / changed).write_text(mutated((source / changed).read_text(), m))
        status, output = run(build, folder, m)
    lines = [line.strip() for line in output.splitlines() if m.found_by in line]
    failed = [line for line in output.splitlines() if line.startswith("FAILED")]
    return status == 1 and bool(failed) and bool(lines), lines[
        1 if len(lines) > 1 else 0 : 2
    ] or output


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="build folder with tests/test_cuda_*_ptx and ptx/")
    parser.add_argument("--only", default="", help="only faults whose description contains this")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()
    missed = []
    chosen = [m for m in MUTATIONS if arguments.only in m.fault]
    if not (arguments.build / "tests" / "test_gemm_ptx").exists():
        print("the matrix products' mutations are left out: this build has no CUTLASS")
        chosen = [m for m in chosen if m.kernel not in (GEMM, GEMM_HALVES, GEMM_BLOCKS)]
    # The longest first: those of Hopper's products take seconds each.
    chosen.sort(key=lambda m: not m.kernel.startswith("gemm_sm90"))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for m, (found, said) in zip(
            chosen, pool.map(partial(caught, arguments.build.resolve()), chosen), strict=True
        ):
            print(
                f"{'caught' if found else 'MISSED'}: {m.fault} ({m.kernel}): {str(said)[:160]}",
                flush=True,
            )
            if not found:
                missed.append(m.fault)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutations caught")
    return 1 if missed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
