"""`quaver info --gemm`: a GPU's kernels that can serve a product, and the choice among them."""

from __future__ import annotations

import argparse

from .errors import UsageError
from .gemm_table import Product

__all__ = ["show"]


def show(arguments: argparse.Namespace) -> None:
    """Prints the kernels of the product that the flags describe. UsageError for flags that describe
    none."""
    if arguments.sms >= 2**31:
        raise UsageError(f"--sms must be below 2^31, got {arguments.sms}")
    product = Product.of_flags(arguments.gemm, arguments, arguments.arch)
    candidates, reason = product.candidates(arguments.sms)
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
    print("Predicted is of the peak, by a model; `quaver tune-gemm` measures.")
