"""`quaver plan`: the arguments, the table and the remedy."""

from __future__ import annotations

import argparse

import torch

from .. import models, optimizers, recipe
from ..errors import UsageError
from .cards import CARDS
from .plan import Plan, plan

__all__ = ["add_arguments", "run"]

GB = 10**9
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The flags of `quaver plan`."""
    p.add_argument(
        "--model",
        required=True,
        help=f"{', '.join(models.PRESETS)}, a JSON file, or the folder of a Hugging Face model",
    )
    p.add_argument("--recipe", default="bf16", help=f"one of {', '.join(recipe.names())}")
    p.add_argument(
        "--optimizer",
        help=f"one of {', '.join(optimizers.names())}; without it AdamW keeps the states of the "
        "recipe",
    )
    p.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch")
    p.add_argument(
        "--seq", type=int, help="tokens a sequence; 2048, or the model's context, if not given"
    )
    p.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the parameters")
    p.add_argument(
        "--release", action="store_true", help="backward updates each parameter and frees its "
        "gradient, without clipping",
    )  # fmt: skip
    p.add_argument(
        "--recompute", action="store_true", help="backward runs the forward of each block again"
    )
    p.add_argument(
        "--gpu", metavar="NAME", help=f"say whether it fits that card: {', '.join(CARDS)}"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan. Raises UsageError, with a remedy, where it does not fit the card."""
    try:
        found = plan(
            arguments.model,
            arguments.recipe,
            arguments.optimizer,
            batch=arguments.batch,
            seq=arguments.seq,
            dtype=DTYPES[arguments.dtype],
            release=arguments.release,
            recompute=arguments.recompute,
            gpu=arguments.gpu,
        )
    except UsageError as error:  # the command has its own name before the text
        raise UsageError(str(error).removeprefix("plan: ")) from None
    print(table(found))
    if found["gpu"] is not None and not found["fits"]:
        raise UsageError(remedy(found))


def table(found: Plan) -> str:
    """The plan as lines of text, in GB of 10^9 bytes."""
    settings = found["settings"]
    flags = [name for name in ("release", "recompute") if settings[name]]
    what = [
        settings["recipe"],
        settings["optimizer"] or "the recipe's AdamW",
        f"batch {settings['batch']} x {settings['seq']}",
        settings["dtype"],
        *flags,
    ]
    lines = [f"{settings['model']}, {found['parameters']:,} parameters: {', '.join(what)}"]
    lines += [f"  {kind:<12}{size / GB:>10.3f} GB" for kind, size in found["peak_by_kind"].items()]
    lines.append(f"  {'peak':<12}{found['peak'] / GB:>10.3f} GB, in {found['peak_at']}")
    if found["gpu"] is not None:
        spare = found["gpu_bytes"] - found["peak"]
        verdict = "fits" if spare >= 0 else "does not fit"
        lines.append(
            f"{verdict} {found['gpu']} of {found['gpu_bytes'] / GB:g} GB: "
            f"{abs(spare) / GB:.3f} GB {'to spare' if spare >= 0 else 'too much'}"
        )
    return "\n".join(lines)


def remedy(found: Plan) -> str:
    """One line for a plan that does not fit: what takes less memory and is not in use."""
    settings = found["settings"]
    less = [f"--{name}" for name in ("recompute", "release") if not settings[name]]
    if settings["batch"] > 1:
        less.append("a smaller --batch")
    if settings["optimizer"] != "adamw-4bit":
        less.append("--recipe coat --optimizer adamw-4bit")
    return (
        f"{settings['model']} needs {found['peak'] / GB:.1f} GB and {found['gpu']} has "
        f"{found['gpu_bytes'] / GB:g}: try {', '.join(less) or 'a larger card'}"
    )
