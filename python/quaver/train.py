"""`quaver train`: the same model on the same batches, once for each recipe, on one rank or several.

Ranks share each micro-batch; the first of them writes.
"""

import math
import os
import signal
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch

from quaver import data, distributed, machine, models, recipe
from quaver.distributed.launch import parse_parallel
from quaver.errors import UsageError
from quaver.job import Interrupted, Job
from quaver.plot import plot_losses, plot_memory
from quaver.progress import baseline, table
from quaver.rundir import RunDir

__all__ = ["Interrupted", "Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """What `quaver train` is asked to do; the fields are its flags. `batch` is the size of a
    micro-batch, of which `accumulate` make a step; ranks share it. Raises UsageError naming a flag
    out of range."""

    data: tuple = ("stdlib",)
    tokenizer: str | None = None
    model: str = "tiny"
    recipe: tuple = ("bf16", "fp8lm-o2")
    steps: int = 300
    batch: int = 8
    seq: int = 256
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int | None = None
    seed: int = 0
    device: str = "auto"
    out: str = "runs/demo"
    save_every: int = 100
    resume: bool = False
    overwrite: bool = False
    tensorboard: bool = False
    probe: int = 0
    parallel: str | None = None

    def __post_init__(self):
        for name in ("steps", "batch", "seq", "accumulate", "save_every"):
            value = getattr(self, name)
            if value < 1:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} must be at least 1, got {value}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"--lr must be a positive number, got {self.lr}")
        if self.probe < 0:
            raise UsageError(f"--probe must be 0 (off) or a number of steps, got {self.probe}")
        if self.warmup is None:
            object.__setattr__(self, "warmup", self.steps // 20)
        if not 0 <= self.warmup < self.steps:
            raise UsageError(f"--warmup must be 0 to {self.steps - 1}, got {self.warmup}")
        ranks = parse_parallel(self.parallel)
        tensor = ranks.pop("tp", 1)
        if self.batch % math.prod(ranks.values()):
            raise UsageError(
                f"--batch {self.batch} does not divide among {math.prod(ranks.values())} ranks"
            )
        if self.seq % tensor:
            raise UsageError(f"--seq {self.seq} does not divide among tp={tensor}")
        if not self.recipe:
            raise UsageError("--recipe names none")
        if len(set(self.recipe)) != len(self.recipe):
            raise UsageError(f"--recipe names one twice: {','.join(self.recipe)}")
        for name in self.recipe:
            try:
                recipe.get(name)
            except ValueError as error:
                raise UsageError(f"--recipe: {error}") from None


def _model_config(settings, vocab):
    config = models.load(settings.model)
    if settings.model in models.PRESETS:
        config = config.replace(vocab=vocab)
    if config.vocab < vocab:
        raise UsageError(f"--model {settings.model}: vocab {config.vocab}, the data needs {vocab}")
    if config.context < settings.seq:
        raise UsageError(f"--seq {settings.seq} exceeds the model's context {config.context}")
    return config


def _describe(settings, model, device, text):
    """What decides the numbers of a run: written to config.json and compared on resumption."""
    left_out = (
        "out", "resume", "overwrite", "save_every", "tensorboard", "probe", "recipe", "parallel",
    )  # fmt: skip
    tensor = parse_parallel(settings.parallel).get("tp", 1)  # each part has its checkpoint
    config = {key: value for key, value in asdict(settings).items() if key not in left_out}
    return (
        config
        | {
            "data": list(settings.data),
            "data_sha256": text.fingerprint,
            "recipes": list(settings.recipe),
            "model": model.as_dict(),
            "device": device.type,
        }
        | ({"tensor_parallel": tensor} if tensor > 1 else {})
    )


def run(settings):
    """Trains every recipe of `settings` and returns the summary, which is also in OUT/summary.json.

    Raises UsageError, before anything is written, for settings that cannot work, and Interrupted
    after saving when SIGINT or SIGTERM asked to stop.
    """
    device = machine.choose_device(settings.device)
    models.load(settings.model)  # before the data is read, which takes longer
    writer = _tensorboard() if settings.tensorboard else None
    with _world(settings, device) as world:
        return _run(settings, world, writer)


@contextmanager
def _world(settings, device):
    """The ranks that --parallel asks for: torchrun has started this process as one of them."""
    parts = parse_parallel(settings.parallel)
    ranks = math.prod(parts.values())
    started = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if started != ranks:
        raise UsageError(
            f"--parallel {settings.parallel or 'dp=1'} is for {ranks} processes, {started} started:"
            f" torchrun --nproc-per-node {ranks} -m quaver train ..."
        )
    if ranks == 1:
        yield distributed.World(device)
        return
    distributed.init(device.type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    yield distributed.World(device, parts.get("tp", 1))
    # Not where something failed: a group with a dead rank is left to the end of the process.
    torch.distributed.destroy_process_group()


def _run(settings, world, writer):
    text = data.load(settings.data, settings.seq, settings.tokenizer)
    model_config = _model_config(settings, text.vocab)
    config = _describe(settings, model_config, world.device, text)
    distributed.compare("train", world.share({"configuration": config}))
    folder = RunDir(settings.out)
    show = print if world.rank == 0 else lambda *args: None
    with ExitStack() as stack, _stop_signals() as stop:
        results = world.first(lambda: _open(folder, config, settings, stack))
        results = world.share(results)[0]
        if text.skipped:
            show(f"left out {len(text.skipped)} binary files, such as {text.skipped[0]}")
        tokens, held_out = len(text.train), len(text.held_out)
        ranks = f", {settings.parallel}" if world.size > 1 else ""
        show(f"{tokens:,} tokens to train on, {held_out:,} held out; {world.device.type}{ranks}")
        job = Job(settings, model_config, text, world.device, folder, writer, world)
        described = config | {"parallel": settings.parallel}
        summary = {"recipes": results, "machine": machine.describe(), "config": described}
        losses = {}
        for name in settings.recipe:
            results[name], losses[name] = job.train(name, stop, done=results.get(name))
            world.first(lambda: folder.write_summary(summary))
        rows = settings.batch * settings.accumulate
        title = f"{settings.model}, {rows} x {settings.seq} tokens a step"
        world.first(lambda: _plot(folder, losses, results, title, settings))
    paths = (folder.summary_path, folder.plot_path, folder.memory_plot_path)
    show(f"\n{table(results)}\n\n{'  '.join(map(str, paths))}")
    return summary


def _plot(folder, losses, results, title, settings):
    plot_losses(folder.plot_path, losses, title, baseline(losses))
    memories = {name: result["memory"] for name, result in results.items()}
    title = f"{settings.model}, {settings.batch} x {settings.seq} tokens a micro-batch"
    plot_memory(folder.memory_plot_path, memories, title, baseline(memories))


def _open(folder, config, settings, stack):
    """Makes the folder ready; returns the results of the recipes that are done."""
    folder.check(config, settings.resume, settings.overwrite)
    stack.enter_context(folder.started(config, settings.resume))
    return folder.results() if settings.resume else {}


def _tensorboard():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs `tensorboard`: pip install tensorboard") from None
    return SummaryWriter


@contextmanager
def _stop_signals():
    """Yields an Event that SIGINT and SIGTERM set. A second signal acts as it would without us."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may install handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number, frame):
        stop.set()
        restore()

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()
