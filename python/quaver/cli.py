"""The command `quaver`: train, tune, export, plan, info, bench.

Exit status: 0 done, 2 a mistake in flags or files (one line on stderr), 1 a failure of the system
(one line), 130 stopped by a signal.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import torch

import quaver as qv

from . import gemm_info, gemm_table, machine, models, optimizers, recipe, train, tune
from .distributed import RankFailure
from .distributed.launch import announce
from .errors import UsageError
from .exporting import add_export
from .planning import command as planning
from .settings import SCHEDULES, RunSettings, names
from .tune.flags import add_chat, add_method

__all__ = ["command", "main"]


class _Help(argparse.HelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        default = action.default
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        return f"{action.help} (default: {default})"


def _add_train(commands: argparse._SubParsersAction) -> None:
    default = train.Settings()
    p = commands.add_parser(
        "train",
        help="train a small model with one recipe or optimizer, or several",
        formatter_class=_Help,
        description="Train a model on text, by each recipe and optimizer, on the same batches.",
    )
    _add_task(p, default)
    _add_run(p, default)
    p.add_argument(
        "--parallel",
        metavar="KIND=N",
        help="under torchrun: dp=N processes that share each micro-batch, zero=N with optimizer "
        "states spread over them, or fsdp=N with everything sharded (FSDP2); tp=N that share the "
        "model; dp=N,tp=M is N x M processes",
    )
    p.set_defaults(call=_train)


def _add_task(p: argparse.ArgumentParser, default: train.Settings) -> None:
    """The flags that decide the numbers of a run."""
    p.add_argument(
        "--data",
        nargs="+",
        default=list(default.data),
        metavar="PATH",
        help="text, .jsonl and .parquet files, folders, or stdlib: the text of Python's standard "
        "library",
    )
    p.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="JSON file of the package tokenizers, or a folder of transformers; without it that of "
        "--model DIR, or a token is a byte",
    )
    p.add_argument(
        "--end-token", metavar="TEXT", help="of --tokenizer, behind each document; found if usual"
    )
    p.add_argument(
        "--text-field",
        default=default.text_field,
        metavar="NAME",
        help="of the rows of .jsonl and .parquet files",
    )
    p.add_argument(
        "--model",
        default=default.model,
        help=f"{', '.join(models.PRESETS)}, a JSON file, or a folder of transformers to start from",
    )
    p.add_argument(
        "--recipe",
        type=names,
        help=f"comma-separated: {', '.join(recipe.names())} (default: "
        f"{','.join(default.recipe)}; bf16 with --optimizer)",
    )
    p.add_argument(
        "--optimizer",
        type=names,
        help=f"comma-separated: {', '.join(optimizers.names())}; or all. Each trains with each "
        "recipe. Without it AdamW keeps the states of the recipe",
    )
    p.add_argument("--lr", type=float, help=_rates(default.lr))
    p.add_argument("--seq", type=int, default=default.seq, help="tokens a sequence")
    p.add_argument(
        "--watch",
        type=int,
        default=default.watch,
        metavar="N",
        help="every N steps move layers whose values FP8 loses to bf16, and others back; 0 never",
    )
    _add_steps(p, default)


def _add_steps(p: argparse.ArgumentParser, default: RunSettings) -> None:
    p.add_argument("--steps", type=int, default=default.steps, help="optimizer steps, in all")
    p.add_argument("--batch", type=int, default=default.batch, help="sequences a micro-batch")
    p.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    p.add_argument("--warmup", type=int, help="steps of warmup; 5 %% of the steps if not given")
    p.add_argument(
        "--schedule", default=default.schedule, help=f"of the rate: {', '.join(SCHEDULES)}"
    )
    p.add_argument(
        "--weight-decay", type=float, default=default.weight_decay, help="of matrices alone"
    )
    p.add_argument(
        "--betas", type=float, nargs=2, default=default.betas, metavar=("B1", "B2"), help="of Adam"
    )
    p.add_argument(
        "--clip",
        type=float,
        default=default.clip,
        metavar="NORM",
        help="the largest norm of the gradient; 0 for any",
    )
    p.add_argument("--seed", type=int, default=default.seed, help="of weights and batches")
    p.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default=default.device, help="where to run"
    )


def _rates(base: float) -> str:
    own = {name: base * optimizers.rate(name) for name in optimizers.names()}
    other = ", ".join(f"{rate:g} of {name}" for name, rate in own.items() if rate != base)
    return f"peak learning rate, of every optimizer (default: {base:g}; {other})"


def _add_run(p: argparse.ArgumentParser, default: RunSettings) -> None:
    """The flags of where and how a run runs, none of which changes its numbers."""
    p.add_argument("--out", default=default.out, help="folder for metrics and checkpoints")
    p.add_argument(
        "--save-every",
        type=int,
        default=default.save_every,
        metavar="N",
        help="steps between checkpoints",
    )
    p.add_argument(
        "--eval-every",
        type=int,
        default=default.eval_every,
        metavar="N",
        help="steps between held-out losses; 0: at the end alone",
    )
    p.add_argument("--tensorboard", action="store_true", help="write TensorBoard logs too")
    p.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    p.add_argument(
        "--probe",
        type=int,
        default=default.probe,
        metavar="N",
        help="every N steps measure what FP8 does to each tensor (SNR, zeros, saturated values, "
        "k), into metrics.jsonl and TensorBoard; 0 never",
    )
    again = p.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="continue the run in --out, with more --steps too"
    )
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out")


def _train(arguments: argparse.Namespace) -> None:
    train.run(train.Settings(**_fields(train.Settings, arguments)))


def _fields(settings: type, arguments: argparse.Namespace) -> dict:
    """The arguments that are fields of a class of settings."""
    fields = {field.name for field in dataclasses.fields(settings)}
    values = {key: value for key, value in vars(arguments).items() if key in fields}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _add_tune(commands: argparse._SubParsersAction) -> None:
    default = tune.Settings()
    p = commands.add_parser(
        "tune",
        help="finetune a model of transformers by one method or several",
        formatter_class=_Help,
        description="Finetune a model on instruction data, by each method on the same batches. "
        "The loss is that of the answers.",
    )
    p.add_argument("--model", required=True, metavar="DIR", help="a folder of transformers")
    add_chat(p, default)
    add_method(p, default)
    _add_steps(p, default)
    _add_run(p, default)
    p.set_defaults(call=_tune)


def _tune(arguments: argparse.Namespace) -> None:
    tune.run(tune.Settings(**_fields(tune.Settings, arguments)))


def _add_plan(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser(
        "plan",
        help="the memory of a training step, before it runs",
        formatter_class=_Help,
        description="Run a step without storage and print the memory at its peak.",
    )
    planning.add_arguments(p)
    p.set_defaults(call=planning.run)


def _add_info(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser(
        "info",
        help="what this machine offers and which backend will run",
        formatter_class=_Help,
    )
    p.add_argument(
        "--gemm",
        nargs=3,
        type=int,
        metavar=("M", "N", "K"),
        help="list the kernels of a GPU that can serve this product instead, and say which and why",
    )
    _add_product(p)
    p.add_argument("--sms", type=int, default=132, help="with --gemm: multiprocessors of the GPU")
    p.add_argument(
        "--arch", default="sm_90", help="with --gemm: the GPU's architecture, sm_89 or newer"
    )
    p.set_defaults(call=_info)


def _add_product(p: argparse.ArgumentParser) -> None:
    """The flags of a matrix product beside its shape."""
    p.add_argument(
        "--types",
        type=names,
        default="e4m3,e4m3,bf16",
        help="formats of a, b and the result",
    )
    p.add_argument("--accumulate", action="store_true", help="add to the result")
    p.add_argument(
        "--scales",
        choices=("outer", "tiles", "blocks"),
        default="outer",
        help="scales: of tensors or rows, of 1 x 128 blocks by 128 x 128 tiles, or of blocks "
        "by blocks",
    )
    p.add_argument("--promoted", action="store_true", help="sums in f32 only")


def _add_tune_gemm(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser(
        "tune-gemm",
        help="measure the kernels of matrix products on this GPU, for use_gemm_table",
        formatter_class=_Help,
    )
    p.add_argument(
        "shapes",
        nargs="+",
        type=gemm_table.shape_of,
        metavar="MxNxK",
        help="of [M, K] by [N, K]: tokens, outputs and inputs of a linear layer, which pads to 16",
    )
    _add_product(p)
    p.add_argument("--table", default="gemm.json", help="what is written, or added to")
    p.set_defaults(call=gemm_table.run)


def _info(arguments: argparse.Namespace) -> None:
    if arguments.gemm:
        return gemm_info.show(arguments)
    for title, values in (("build", qv.build_info()), ("machine", machine.describe())):
        print(title)
        for key, value in values.items():
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            print(f"  {key:<22}{text}")
    reason = machine.why_not_cuda()
    print("backend of each op")
    for op, keys in machine.backends().items():
        runs = "cuda" if "cuda" in keys and reason is None else "cpu"
        print(f"  {op:<22}{runs:<6}(built for {', '.join(keys)})")
    print("CUDA" + (f" will not run: {reason}" if reason else " will run"))


def _add_bench(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("bench", help="run the benches of the source tree")
    p.add_argument("stage", nargs="?", help="such as gemm; all of them if not given")
    p.set_defaults(call=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    folder = Path(qv.__file__).resolve().parents[2] / "bench"
    found = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    if not found:
        raise UsageError("the benches are part of the source tree: run this from a checkout")
    if arguments.stage is not None and arguments.stage not in found:
        raise UsageError(f"no bench {arguments.stage!r}: there are {', '.join(found)}")
    for stage in [arguments.stage] if arguments.stage else found:
        status = subprocess.run([sys.executable, found[stage]], check=False).returncode
        if status:
            return status
    return 0


class _ArgumentsError(Exception):
    """Arguments that argparse does not accept: the command and the reason."""


class _Parser(argparse.ArgumentParser):
    """argparse prints its usage before an error; one line is enough, and --help is there."""

    def error(self, message: str) -> NoReturn:
        raise _ArgumentsError(self.prog, message)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = _Parser(prog="quaver", description="FP8 training for PyTorch.")
    parser.add_argument("--version", action="version", version=f"quaver {qv.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_tune(commands)
    add_export(commands, _Help)
    _add_plan(commands)
    _add_info(commands)
    _add_tune_gemm(commands)
    _add_bench(commands)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        parsed = parser.parse_args(arguments)
    except _ArgumentsError as error:
        print("{}: error: {}".format(*error.args), file=sys.stderr, flush=True)
        if arguments[:1] == ["train"]:
            announce(error.args[1])
        return 2
    name = f"quaver {parsed.command}"
    try:
        return parsed.call(parsed) or 0
    except UsageError as error:
        print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        if parsed.call is _train:
            announce(str(error))
        return 2
    except (MemoryError, torch.OutOfMemoryError) as error:
        print(f"{name}: error: out of memory: {error}", file=sys.stderr)
        return 1
    except (OSError, RankFailure) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2 if getattr(error, "usage", False) else 1
    except (train.Interrupted, KeyboardInterrupt):
        return 130


def command() -> NoReturn:
    """Runs the command line as a process of its own, and ends it with the exit status."""
    status = main()
    if "RANK" in os.environ:
        # A thread of a process group that outlives the interpreter aborts the process, and one that
        # waits for a rank that is gone holds it up. All files are closed by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
