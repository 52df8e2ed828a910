"""The steps of `make gpu-report`, in order.

A step may use the seconds that are its own and what the steps before it left over, so the sum is
the most that the report takes. {python} is the interpreter, {work} the folder for what the steps
leave, {bench_cuda} the C++ bench of the build.
"""

from dataclasses import dataclass

SECONDS = 540  # the most that a report may take


@dataclass(frozen=True)
class Step:
    """`command` is run, `dry` is what a dry run runs instead: it must pass on a machine without a
    GPU. `needs` are steps without which this one is skipped. `tool` is a program without which it
    is skipped too. `rows` is the file in {work} where it leaves measured rows, `targets` the keys
    of targets.py that they fill."""

    name: str
    seconds: int
    proves: str
    command: tuple[str, ...]
    dry: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("build",)
    tool: str | None = None
    rows: str | None = None
    targets: tuple[str, ...] = ()


def _bench(name, seconds, proves, targets=()):
    script = f"bench/bench_{name}.py"
    rows = f"{name}.json"
    return Step(
        name,
        seconds,
        proves,
        ("{python}", script, "--device", "cuda", "--out", f"{{work}}/{rows}"),
        ("{python}", script, "--device", "cuda", "--list"),
        rows=rows,
        targets=targets,
    )


def _sanitizer(tool, proves):
    return Step(
        tool,
        20,
        proves,
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "{bench_cuda}", "--check"),
        tool="compute-sanitizer",
        needs=("build", "cpp-check"),
    )


# A model and a batch that train for some ten seconds under each recipe; {recipes} are those of
# RECIPES that the build knows.
RECIPES = ("bf16", "fp8lm-o2", "coat")
_COMMON = "{python} -m quaver train --recipe {recipes} --out {work}/train --overwrite "
TRAIN = _COMMON + "--data stdlib --model 125m --steps 100 --batch 16 --seq 1024 --device cuda"
TRAIN_DRY = _COMMON + "--data README.md --model tiny --steps 2 --batch 1 --seq 32 --device cpu"
TUNE = (
    "{python} -m quaver tune-gemm 8192x4096x4096 8192x11008x4096 8192x4096x11008 "
    "--table {work}/gemm.json"
)
TUNE_DRY = "{python} -m quaver info --gemm 8192 4096 4096"

PLAN = (
    Step(
        "build",
        190,
        "the library is built from this tree, or a carried build is of it, and it loads",
        ("{python}", "bench/gpu_build.py", "--work", "{work}"),
        ("{python}", "bench/gpu_build.py", "--work", "{work}", "--dry-run"),
        needs=(),
    ),
    Step(
        "cpp-check",
        10,
        "the memory-bound kernels give the CPU's bits, without torch",
        ("{bench_cuda}", "--check"),
        ("{bench_cuda}", "--list"),
    ),
    Step(
        "tests",
        70,
        "every CUDA op against the CPU, bit for bit; GEMM against f64; streams, graphs, errors",
        (
            "{python}",
            "-m",
            "pytest",
            "-m",
            "cuda",
            "-q",
            "--continue-on-collection-errors",
            "--junitxml",
            "{work}/tests.xml",
        ),
        ("{python}", "-m", "pytest", "-m", "cuda", "-q", "--collect-only"),
    ),
    _bench(
        "gemm",
        50,
        "matrix products against torch._scaled_mm",
        ("gemm-fast", "gemm-promoted", "gemm-wgrad", "gemm-fp8-out"),
    ),
    _bench("quantize", 20, "casts against a copy and against torch", ("cast", "cast-transpose")),
    _bench(
        "optimizer",
        30,
        "AdamW against a copy, torch and other 8-bit optimizers",
        ("adam-copy", "adam-torch"),
    ),
    _bench(
        "kernels",
        20,
        "sums of shards, norms, activations and gradients against a copy",
        ("reduce-encode",),
    ),
    _bench("layer", 45, "a Llama 7B layer against bf16", ("linears", "layer")),
    Step(
        "cpp",
        15,
        "the kernels alone, without torch and Python, against a copy",
        ("{bench_cuda}", "--json", "{work}/cpp.json"),
        ("{bench_cuda}", "--list"),
        rows="cpp.json",
    ),
    Step(
        "train",
        40,
        "`quaver train` of a small Llama at equal batch: tokens/s, peak memory, loss",
        tuple(TRAIN.split()),
        tuple(TRAIN_DRY.split()),
    ),
    Step(
        "tune-gemm",
        10,
        "the model's choice of kernels for a Llama 7B layer beside the fastest that is measured",
        tuple(TUNE.split()),
        tuple(TUNE_DRY.split()),
    ),
    _sanitizer("memcheck", "no kernel reads or writes where it should not"),
    _sanitizer("racecheck", "no kernel races in shared memory"),
)
