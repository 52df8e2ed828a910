"""The targets of the CUDA backend on one H100 or H200, and the check of measured rows.

The ratios are times faster than the baseline, measured by the protocol of gpu.py: random data,
baseline and candidate by turns in one process, at the clocks that the machine sustains. "Of a
copy" means against a device-to-device copy that moves the same number of bytes.
"""

from dataclasses import dataclass
from statistics import geometric_mean

COPY = "a copy of the same bytes"


@dataclass(frozen=True)
class Target:
    """`worst` and `geomean` are the least that the worst row's ratio and the geometric mean of all
    rows' ratios may be; `stretch` is what the mean would be at its best. `step` is the step of
    gpu_plan.py whose rows fill it."""

    what: str
    baseline: str
    step: str
    worst: float
    geomean: float | None = None
    stretch: float | None = None


TARGETS = {
    "gemm-fast": Target(
        "gemm, fast accumulation: forward and dgrad of Llama 7B and 8B at 4k, 8k, 16k tokens",
        "torch._scaled_mm, tensorwise",
        "gemm",
        worst=0.95,
        geomean=1.0,
        stretch=1.04,
    ),
    "gemm-promoted": Target(
        "gemm, promoted accumulation", "gemm, fast accumulation", "gemm", worst=0.93, stretch=0.97
    ),
    "gemm-wgrad": Target(
        "gemm that accumulates in f32 (wgrad), 4k tokens",
        "torch._scaled_mm + add_",
        "gemm",
        worst=1.35,
        stretch=1.5,
    ),
    "gemm-fp8-out": Target(
        "gemm with FP8 output and amax", "gemm with bf16 output", "gemm", worst=0.98, stretch=1.02
    ),
    "cast-transpose": Target(
        "cast_transpose with amax, 32 MB and more", COPY, "quantize", worst=0.90, stretch=0.95
    ),
    "cast": Target("quantize", COPY, "quantize", worst=0.93, stretch=0.97),
    "reduce-encode": Target(
        "sum of shards, encoded again", COPY, "kernels", worst=0.93, stretch=0.97
    ),
    "adam-copy": Target("adam_, 14 bytes a parameter", COPY, "optimizer", worst=0.90, stretch=0.95),
    "adam-torch": Target(
        "AdamW fp8lm-o2, the whole step",
        "torch AdamW(fused=True), f32",
        "optimizer",
        worst=1.8,
    ),
    "linears": Target(
        "casts and products of a Llama 7B layer, forward and backward",
        "the same layer's nn.Linear in bf16",
        "layer",
        worst=1.75,
        stretch=1.85,
    ),
    "layer": Target(
        "Llama 7B layer, forward, backward and step, 8k tokens",
        "the same layer in bf16",
        "layer",
        worst=1.50,
        stretch=1.60,
    ),
}


def evaluate(rows):
    """{key: what the rows give for that target}, for every target, in the table's order.

    A row counts where it names the target and has a ratio. One row of the target that was not
    measured leaves `met` open (None), unless the others have missed it already.
    """
    results = {}
    for key, target in TARGETS.items():
        mine = [row for row in rows if row.get("target") == key]
        ratios = [row["ratio"] for row in mine if "ratio" in row]
        reasons = list(dict.fromkeys(row["reason"] for row in mine if "ratio" not in row))
        result = {
            "what": target.what,
            "baseline": target.baseline,
            "target": {"worst": target.worst, "geomean": target.geomean},
            "stretch": target.stretch,
            "rows": len(ratios),
            "met": None,
        }
        if not mine:
            reasons = ["no row was measured"]
        if ratios:
            mean, worst = geometric_mean(ratios), min(ratios)
            short = worst < target.worst or mean < (target.geomean or 0.0)
            result |= {"geomean": mean, "worst": worst}
            result["met"] = False if short else None if reasons else True
            result["stretched"] = target.stretch is not None and mean >= target.stretch
        if reasons:
            result["reason"] = "; ".join(reasons)
        results[key] = result
    return results
