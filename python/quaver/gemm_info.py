"""`quaver info --gemm`: a GPU's kernels that can serve a product, and the choice among them."""

from __future__ import annotations

import argparse

from . import _C
from .errors import UsageError

__all__ = ["show"]


def show(arguments: argparse.Namespace) -> None:
    """Prints the kernels of the product that the flags describe. UsageError for flags that describe
    none."""
    for flag, values in (("gemm", arguments.gemm), ("sms", [arguments.sms])):
        if max(values) >= 2**31:
            raise UsageError(f"--{flag} must be below 2^31, got {max(values)}")
    if len(arguments.types) != 3:
        raise UsageError(f"--types wants A,B,OUT, got {','.join(arguments.types)}")
    try:
        candidates, reason = _C.gemm_candidates(
            *arguments.gemm,
            *arguments.types,
            accumulate=arguments.accumulate,
            fast_accumulate=not arguments.promoted,
            sm_count=arguments.sms,
            scales=arguments.scales,
            arch=arguments.arch,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    m, n, k = arguments.gemm
    gpu = f"{arguments.arch}, {arguments.sms} SMs"
    print(f"gemm [{m}, {k}] x [{n}, {k}], {' '.join(arguments.types)}, {gpu}")
    row = "{:<40}{:>12}{:>8}{:>9}{:>8}{:>8}{:>8}{:>11}".format
    print(row("kernel", "tile", "cluster", "swizzle", "splits", "tiles", "waves", "predicted"))
    for c in candidates:
        tile, cluster = ("x".join(map(str, c[key])) for key in ("tile", "cluster"))
        print(
            row(
                *(c["name"], tile, cluster, c["swizzle"], c["splits"], c["tiles"]),
                *(f"{c['waves']:.2f}", f"{c['efficiency']:.1%}"),
            )
        )
    print(f"{candidates[0]['name']}: {reason}")
    print("Predicted is of the peak, by a model; `make gpu-report` measures.")
