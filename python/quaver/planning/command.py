"""`quaver plan`: the arguments, the table and the remedy."""

from __future__ import annotations

import argparse
import math

import torch

from .. import models, optimizers, recipe
from ..errors import UsageError
from ..files import expanded
from .cards import CARDS, LINKS, RATES, card
from .cluster import Cluster, model_cluster
from .figure import plot_plans
from .fit import tries
from .plan import Plan, plan

__all__ = ["add_arguments", "run"]

GB = 10**9
SIZES = (24, 48, 80, 141)
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The flags of `quaver plan`."""
    p.add_argument(
        "--model",
        required=True,
        help=f"{', '.join(models.PRESETS)}, a JSON file, or the folder of a Hugging Face model",
    )
    p.add_argument(
        "--recipe", help=f"one of {', '.join(recipe.names())}; bf16, or what --fit finds"
    )
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
        "--parallel",
        default="",
        metavar="KIND=N",
        help="the memory and the messages of one rank of dp=N, zero=N, fsdp=N or tp=N, or of "
        "dp=N,tp=M; --batch is each rank's own",
    )
    p.add_argument(
        "--link", metavar="NAME", help=f"the time of the messages over {', '.join(LINKS)}"
    )
    p.add_argument(
        "--gpu", metavar="NAME", help=f"say whether it fits that card: {', '.join(CARDS)}"
    )
    p.add_argument(
        "--largest", action="store_true", help=f"the largest --batch on {_sizes()} GB too"
    )
    p.add_argument(
        "--fit",
        type=float,
        metavar="GB",
        help="search for settings with which it fits that memory, beside those that are given",
    )
    p.add_argument(
        "--cluster",
        metavar="RANKSxGPU",
        help=f"model a step on all ranks of such a cluster, as 1024xh100 ({', '.join(RATES)}); "
        "--parallel is then dp, zero or fsdp (the default), without a number",
    )
    p.add_argument(
        "--utilization", type=float, metavar="SHARE", help="of the cluster's stated rates that "
        "products reach; 0.5 if not given",
    )  # fmt: skip
    p.add_argument("--plot", metavar="FILE", help="draw the peak by kind to a PNG file")


def _sizes() -> str:
    return "/".join(str(size) for size in SIZES)


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan. Raises UsageError, with a remedy, where it does not fit the card."""
    try:
        _run(arguments)
    except UsageError as error:  # the command has its own name before the text
        raise UsageError(str(error).removeprefix("plan: ")) from None


def _run(arguments: argparse.Namespace) -> None:
    options = {
        name: getattr(arguments, name)
        for name in ("batch", "seq", "parallel", "release", "recompute", "gpu", "link")
    } | {"dtype": DTYPES[arguments.dtype]}
    if arguments.utilization is not None and arguments.cluster is None:
        raise UsageError("--utilization is of a --cluster")
    if arguments.cluster is not None:
        return print(_cluster(arguments, options))
    if arguments.fit is not None:
        plans = _fit(arguments, options)
    else:
        recipe = arguments.recipe or "bf16"
        plans = [plan(arguments.model, recipe, arguments.optimizer, **options)]
    found = plans[-1]
    print(table(found))
    if arguments.plot is not None:
        size = found["gpu_bytes"] if arguments.fit is None else round(arguments.fit * GB)
        labels = {describe(each).replace("--", ""): each for each in plans}
        plot_plans(expanded(arguments.plot), labels, _title(found), size)
    if arguments.largest:
        for size in SIZES:
            print(f"largest batch on {size} GB: {found.largest_batch(size * GB)}")
    if found["gpu"] is not None and not found["fits"]:
        raise UsageError(remedy(found))


def _cluster(arguments: argparse.Namespace, options: dict) -> str:
    """The lines of a cluster's model."""
    for flag in ("fit", "gpu", "plot", "largest"):
        if getattr(arguments, flag):
            raise UsageError(f"--cluster goes without --{flag}")
    options = {k: v for k, v in options.items() if k not in ("gpu", "link", "parallel")}
    if arguments.utilization is not None:
        options["utilization"] = arguments.utilization
    found = model_cluster(
        arguments.model, arguments.recipe or "bf16", arguments.optimizer,
        cluster=arguments.cluster, parallel=arguments.parallel or "fsdp",
        link_name=arguments.link or "ib-ndr", **options,
    )  # fmt: skip
    return cluster_table(found)


def cluster_table(found: Cluster) -> str:
    """The model of a step as lines of text."""
    sent = ", ".join(
        f"{kind} {size / GB:.3f}" for kind, size in found.communication.items() if size
    )
    bound = found.tokens / found.step_seconds, found.tokens / found.overlapped_seconds
    return "\n".join([
        f"A model, not a measurement: {found.ranks} x {found.gpu} over {found.link}, "
        f"{found.tokens:,} tokens a step",
        f"  products    {found.operations_fp8:>10.3g} operations of a rank in FP8, "
        f"{found.operations_bf16:.3g} in bf16",
        f"  compute     {1e3 * found.compute_seconds:>10.1f} ms at {found.utilization:g} of the "
        "stated rates",
        f"  messages    {1e3 * found.communication_seconds:>10.1f} ms at the stated rate: {sent} "
        "GB",
        f"  step        {1e3 * found.overlapped_seconds:>10.1f} ms with full overlap, "
        f"{1e3 * found.step_seconds:.1f} with none: {bound[1]:,.0f} to {bound[0]:,.0f} tokens/s",
        f"  peak        {found.peak / GB:>10.3f} GB of {card(found.gpu) / GB:g}: "
        f"{'fits' if found.fits else 'does not fit'}",
    ])  # fmt: skip


def _fit(arguments: argparse.Namespace, options: dict) -> list[Plan]:
    """All that are tried, each with its line; the last fits --fit."""
    if not 0 < arguments.fit < math.inf:
        raise UsageError(f"--fit wants GB above 0, got {arguments.fit:g}")
    size, plans = round(arguments.fit * GB), []
    for found in tries(arguments.model, size, arguments.recipe, arguments.optimizer, **options):
        print(f"{found['peak'] / GB:>10.3f} GB: {describe(found)}", flush=True)
        plans.append(found)
    least = min(plans, key=lambda found: found["peak"])
    if least["peak"] > size:
        raise UsageError(
            f"nothing fits {arguments.fit:g} GB, the least is {least['peak'] / GB:.3g} GB with "
            f"{describe(least)}: try --parallel fsdp=N, a shorter --seq or a smaller --batch"
        )
    return plans


def describe(found: Plan) -> str:
    """The settings that decide the memory, as flags."""
    settings = found["settings"]
    flags = [f"--{name}" for name in ("release", "recompute") if settings[name]]
    if settings["optimizer"] is not None:
        flags.insert(0, f"--optimizer {settings['optimizer']}")
    return " ".join([f"--recipe {settings['recipe']}", *flags])


def _title(found: Plan) -> str:
    settings = found["settings"]
    count = f"{settings['model']}, {found['parameters']:,} parameters"
    size = f"batch {settings['batch']} x {settings['seq']}, {settings['dtype']}"
    ranks = f", rank {settings['rank']} of {settings['parallel']}"
    return f"{count}, {size}{ranks if settings['parallel'] != 'dp=1' else ''}"


def table(found: Plan) -> str:
    """The plan as lines of text, in GB of 10^9 bytes."""
    lines = [_title(found), describe(found)]
    lines += [f"  {kind:<12}{size / GB:>10.3f} GB" for kind, size in found["peak_by_kind"].items()]
    lines.append(f"  {'peak':<12}{found['peak'] / GB:>10.3f} GB, in {found['peak_at']}")
    sent = {kind: size for kind, size in found["communication"].items() if size}
    if sent:
        kinds = ", ".join(f"{kind} {size / GB:.3f}" for kind, size in sent.items())
        lines.append(f"  sends in a step: {kinds} GB")
    if sent and found["link"] is not None:
        milliseconds = 1e3 * found["communication_seconds"]
        lines.append(f"  at the stated rate of {found['link']}: {milliseconds:.1f} ms")
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
        f"{settings['model']} needs {found['peak'] / GB:.3g} GB and {found['gpu']} has "
        f"{found['gpu_bytes'] / GB:g}: try {', '.join(less) or 'a larger card'}, or let "
        f"--fit {found['gpu_bytes'] / GB:g} search"
    )
