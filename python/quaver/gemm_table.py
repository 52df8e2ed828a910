"""Tables of the kernels that were measured to be the fastest for matrix products on a GPU:
`quaver tune-gemm` writes one, and `use_gemm_table` puts it before the model that chooses else.

A table is JSON: {"gpu", "multiprocessors", "arch", "products": [a Product's fields, "kernel", its
name, and "microseconds", {kernel: the median of a call}]}.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from . import _C, machine
from .errors import FileError, UsageError
from .files import expanded, read_text, write_text
from .ops.gemm import gemm
from .ops.quantize import quantize

__all__ = ["Product", "measure", "read", "run", "use_gemm_table"]

DTYPES = {
    "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16,
    "f16": torch.float16, "f32": torch.float32,
}  # fmt: skip
GRAINS = {  # of the two operands, by what the kernels call their scales
    "outer": ("tensor", "tensor"), "tiles": ("block", "tile"), "blocks": ("block", "block"),
}  # fmt: skip
ROUNDS, CALLS = 5, 20
ALIGNMENT = 16  # of what layers multiply (nn/cast.py)


@dataclass(frozen=True)
class Product:
    """[m, k] by [n, k], in the words of `quaver info --gemm`: all that a choice depends on, beside
    the number of multiprocessors."""

    m: int
    n: int
    k: int
    a: str = "e4m3"
    b: str = "e4m3"
    out: str = "bf16"
    accumulate: bool = False
    fast_accumulate: bool = True
    scales: str = "outer"
    arch: str = "sm_90"

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @classmethod
    def of_flags(cls, shape: tuple[int, int, int], flags: argparse.Namespace, arch: str) -> Product:
        """UsageError for flags of no product."""
        if len(flags.types) != 3:
            raise UsageError(f"--types wants A,B,OUT, got {','.join(flags.types)}")
        if max(shape) >= 2**31:
            raise UsageError(f"M, N and K must be below 2^31, got {max(shape)}")
        return cls(*shape, *flags.types, flags.accumulate, not flags.promoted, flags.scales, arch)

    def candidates(self, multiprocessors: int) -> tuple[list[dict], str]:
        """The kernels that can serve it, best first by the model, and why the first one is.
        UsageError for a product that none serves."""
        try:
            return _C.gemm_candidates(asdict(self), multiprocessors)
        except ValueError as error:
            raise UsageError(str(error)) from None


FIELDS = typing.get_type_hints(Product)


def use_gemm_table(path: str | os.PathLike | None) -> None:
    """Let products that a table of `quaver tune-gemm` names run by the kernels that it found the
    fastest, in this process from now on; others stay with the model's choice. None: all do.

    Raises:
        FileError: a file that is missing, damaged or no table, or names kernels of another version.
        UsageError: a table of another GPU than the current device, or no GPU.
    """
    if path is None:
        return _C.set_gemm_table([])
    table = read(path)
    found, wanted = _gpu(), (table["gpu"], table["multiprocessors"], table["arch"])
    if found != wanted:
        raise UsageError(
            f"{path}: the table is of {_text(wanted)}, the device is {_text(found)}; measure here "
            "with `quaver tune-gemm`"
        )
    try:
        _C.set_gemm_table([(asdict(product), row["kernel"]) for product, row in _rows(table)])
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None


def read(path: str | os.PathLike) -> dict:
    """A table, whose keys and types are checked. FileError for anything else."""
    text = read_text(expanded(path))
    try:
        table = json.loads(text)
        kinds = {"gpu": str, "multiprocessors": int, "arch": str, "products": list}
        _check_keys(table, kinds)
        for row in table["products"]:
            _check_keys(row, {**FIELDS, "kernel": str, "microseconds": dict})
    except ValueError as error:
        raise FileError(f"{path}: no table of `quaver tune-gemm`: {error}") from None
    return table


def _check_keys(found, kinds: dict[str, type]) -> None:
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        raise ValueError(f"wanted an object of {', '.join(kinds)}")
    for key, kind in kinds.items():
        if type(found[key]) is not kind:
            raise ValueError(f"{key} must be {kind.__name__}, got {found[key]!r}")


def _rows(table: dict):
    for row in table["products"]:
        yield Product(**{name: row[name] for name in FIELDS}), row


def measure(kernels: list[str], seconds: Callable[[str], float]) -> dict[str, float]:
    """{kernel: the median microseconds of a call}, fastest first. The kernels take turns, so that
    a GPU that slows down does so for all; `seconds` runs a product by a kernel."""
    times: dict[str, list[float]] = {kernel: [] for kernel in kernels}
    for _ in range(ROUNDS):
        for kernel, found in times.items():
            found.append(seconds(kernel))
    medians = {kernel: 1e6 * median(found) for kernel, found in times.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


class _OnGpu:
    """Runs a product by a kernel, and times it by the GPU's clock."""

    def __init__(self, product: Product):
        self.product, self.out = product, DTYPES[product.out]
        self.a, self.b = (
            quantize(torch.randn(rows, product.k, device="cuda"), DTYPES[kind], granularity=grain)
            for rows, kind, grain in zip(
                (product.m, product.n), (product.a, product.b), GRAINS[product.scales], strict=True
            )
        )
        fp8 = product.out in ("e4m3", "e5m2")
        self.options = {"out_scale": torch.ones((), device="cuda")} if fp8 else {}
        if product.accumulate:
            out = torch.zeros(product.m, product.n, dtype=self.out, device="cuda")
            self.options = {"out": out, "accumulate": True}

    def __call__(self, kernel: str) -> float:
        _C.set_gemm_table([(asdict(self.product), kernel)])
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._multiply()
        begin.record()
        for _ in range(CALLS):
            self._multiply()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / CALLS / 1e3

    def _multiply(self) -> None:
        fast = self.product.fast_accumulate
        gemm(self.a, self.b, self.out, fast_accumulate=fast, **self.options)


def _gpu() -> tuple[str, int, str]:
    """The current device's name, multiprocessors and architecture. UsageError without one that
    multiplies FP8."""
    reason = machine.why_not_cuda()
    if reason is not None:
        raise UsageError(f"tables of products are those of a GPU, and there is none: {reason}")
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    if (found.major, found.minor) < (8, 9):
        raise UsageError(f"{found.name} has no FP8 products; wanted a GPU from sm_89 on")
    return found.name, found.multi_processor_count, f"sm_{found.major}{found.minor}"


def _text(gpu: tuple[str, int, str]) -> str:
    name, multiprocessors, arch = gpu
    return f"{name} ({arch}, {multiprocessors} multiprocessors)"


def shape_of(text: str) -> tuple[int, int, int]:
    """Of a flag such as 4096x4096x11008."""
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text) is None:
        raise argparse.ArgumentTypeError(f"wanted MxNxK, such as 4096x4096x11008, got {text!r}")
    return tuple(map(int, text.split("x")))


def run(arguments: argparse.Namespace) -> None:
    """`quaver tune-gemm`: measures the products of the flags, adds them to the table, and prints
    each one's fastest kernel beside the model's choice. Sizes are rounded up to multiples of 16, to
    which layers pad. Leaves this process without a table."""
    path = expanded(arguments.table)
    gpu = _gpu()
    multiprocessors, arch = gpu[1:]
    table = _table_of(path, gpu)
    rows = dict(_rows(table))
    for shape in arguments.shapes:
        padded = tuple(-(-size // ALIGNMENT) * ALIGNMENT for size in shape)
        product = Product.of_flags(padded, arguments, arch)
        kernels = [found["name"] for found in product.candidates(multiprocessors)[0]]
        try:
            times = measure(kernels, _OnGpu(product))
        finally:
            use_gemm_table(None)
        fastest = next(iter(times))
        rows[product] = {**asdict(product), "kernel": fastest, "microseconds": times}
        print(
            f"{product}: {fastest} takes {times[fastest]:.1f} us; the model's {kernels[0]} "
            f"{times[kernels[0]]:.1f} us",
            flush=True,
        )
        table["products"] = list(rows.values())
        write_text(path, json.dumps(table, indent=1) + "\n")
    print(f"wrote {path}: quaver.use_gemm_table({str(path)!r}) lets products run by it")


def _table_of(path: Path, gpu: tuple[str, int, str]) -> dict:
    """The table at `path`, or an empty one of this GPU."""
    name, multiprocessors, arch = gpu
    if not path.exists():
        return {"gpu": name, "multiprocessors": multiprocessors, "arch": arch, "products": []}
    table = read(path)
    found = table["gpu"], table["multiprocessors"], table["arch"]
    if found != gpu:
        raise UsageError(
            f"{path}: the table is of {_text(found)}, the device is {_text(gpu)}; name another "
            "--table"
        )
    return table
