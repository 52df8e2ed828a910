"""The flags of `quaver tune` that no other command has."""

from __future__ import annotations

import argparse

from .. import optimizers
from ..settings import names
from .settings import METHODS, RATES, Settings

__all__ = ["add_chat", "add_method"]


def add_chat(p: argparse.ArgumentParser, default: Settings) -> None:
    p.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".jsonl and .parquet files; a line has a prompt and a response, or messages",
    )
    p.add_argument("--eval-data", nargs="+", metavar="FILE", help="held-out examples")
    p.add_argument(
        "--held-out",
        type=float,
        default=default.held_out,
        metavar="SHARE",
        help="of --data, without --eval-data",
    )
    for name in ("prompt", "response"):
        flag, field = f"--{name}-field", getattr(default, f"{name}_field")
        p.add_argument(flag, default=field, metavar="NAME", help=f"of a line's {name}")
    p.add_argument("--seq", type=int, default=default.seq, help="longer examples are cut")


def add_method(p: argparse.ArgumentParser, default: Settings) -> None:
    rates = ", ".join(f"{rate:g} of {method}" for method, rate in RATES.items())
    p.add_argument(
        "--method",
        type=names,
        default=default.method,
        help=f"comma-separated: {', '.join(METHODS)}",
    )
    p.add_argument(
        "--lr",
        type=_method_rates,
        metavar="RATE",
        help=f"peak learning rate: one, or METHOD=RATE,... (default: {rates})",
    )
    p.add_argument(
        "--optimizer", default=default.optimizer, help=f"one of {', '.join(optimizers.names())}"
    )
    p.add_argument(
        "--recipe", default=default.recipe, help="of what trains: f32, bf16, tensorwise or coat"
    )
    p.add_argument(
        "--dtype",
        default=default.dtype,
        help="of the weights: auto (the folder's), bfloat16 or float32",
    )
    p.add_argument(
        "--backbone", default=default.backbone, help="frozen layers of qst, lora: nf4, fp8 or keep"
    )
    p.add_argument("--reduction", type=int, default=default.reduction, help="qst: widths by this")
    p.add_argument("--adapter", type=int, default=default.adapter, help="qst: of a downsampler")
    p.add_argument("--rank", type=int, default=default.rank, help="lora: of its matrices")


def _method_rates(text: str) -> float | dict[str, float]:
    try:
        if "=" not in text:
            return float(text)
        return {name: float(rate) for name, rate in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"wanted a number, or METHOD=RATE,..., got {text!r}"
        ) from None
