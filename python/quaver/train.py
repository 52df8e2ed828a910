"""`quaver train`: the same model on the same batches, once for each recipe and optimizer.

One rank or several: they share each micro-batch; the first of them writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace

import torch

from . import data, distributed, machine, models
from .board import summary_writer
from .distributed.launch import joined
from .errors import UsageError
from .interrupt import Interrupted, stop_signals
from .job import Job, Run, finished
from .optimizers import label
from .plot import plot_losses, plot_memory
from .progress import baseline, table
from .rundir import RunDir
from .settings import Settings, configuration, model_config

__all__ = ["Interrupted", "Settings", "run"]


def run(settings: Settings) -> dict:
    """Trains every recipe and optimizer of `settings` and returns the summary, which is also
    in OUT/summary.json.

    Raises UsageError, before anything is written, for settings that cannot work, and Interrupted
    after saving when SIGINT or SIGTERM asked to stop.
    """
    device = machine.choose_device(settings.device)
    models.load(settings.model)  # before the data is read, which takes longer
    writer = summary_writer() if settings.tensorboard else None
    with _world(settings, device) as world:
        return _run(settings, world, writer)


@contextmanager
def _world(settings: Settings, device: torch.device) -> Iterator[distributed.World]:
    """The ranks of --parallel: torchrun has started this process as one of them."""
    parallel = settings.parallel
    started = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if started != parallel.ranks:
        raise UsageError(
            f"--parallel {parallel} is for {parallel.ranks} processes, {started} started:"
            f" torchrun --nproc-per-node {parallel.ranks} -m quaver train ..."
        )
    if parallel.ranks == 1:
        yield distributed.World(device)
        return
    with joined(device, parallel.tensor, _flags(settings, device)) as world:
        yield world


def _flags(settings: Settings, device: torch.device) -> dict[str, str]:
    """The flags that ranks must share. Inputs may lie in other places: their contents are compared
    when they have been read."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    values |= {"device": device.type, "recipe": ",".join(settings.recipe)}
    values["optimizer"] = settings.optimizer and ",".join(settings.optimizer)
    return {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in values.items()
        if name not in ("data", "tokenizer", "model")
    }


def _run(settings: Settings, world: distributed.World, writer: Callable | None) -> dict:
    text = data.load(settings.data, settings.seq, settings.tokenizer)
    model = model_config(settings, text.vocab)
    config = configuration(settings, model, world.device, text)
    world.agree({"--data": text.fingerprint, "--model": model.as_dict()})
    run = Run(settings, model, text, world, RunDir(settings.out), config, writer)
    _check_optimizers(run)
    show = print if run.writes else lambda *args: None
    with ExitStack() as stack, stop_signals() as stop:
        results = world.all_gather(world.first(lambda: _open(run, stack)))[0]
        _show_data(run, show)
        parallel = None if world.size == 1 else str(settings.parallel)
        summary = {
            "recipes": results,
            "machine": machine.describe(),
            "config": config | {"parallel": parallel},
        }
        curves = {}
        for recipe, optimizer in settings.trainings:
            name = label(recipe, optimizer)
            if name in results:
                curves[name] = finished(run, name, results[name])
            else:
                results[name], curves[name] = Job(run, recipe, optimizer).train(stop)
            world.first(lambda: run.folder.write_summary(summary))
            if 1 < len(curves) < len(settings.trainings):
                show(f"\n{table(results)}\n")
        world.first(lambda: _plot(run, curves, results))
    folder = run.folder
    paths = (folder.summary_path, folder.plot_path, folder.memory_plot_path)
    show(f"\n{table(results)}\n\n{'  '.join(map(str, paths))}")
    return summary


def _check_optimizers(run: Run) -> None:
    """Builds each chosen optimizer for a model of one layer: what one of them refuses is an error
    before anything is written, and not after the others have trained."""
    small = replace(run, model=run.model.replace(layers=1))
    for recipe, optimizer in run.settings.trainings:
        if optimizer is not None:
            Job(small, recipe, optimizer)


def _show_data(run: Run, show: Callable) -> None:
    text, world = run.text, run.world
    if text.skipped:
        show(f"left out {len(text.skipped)} binary files, such as {text.skipped[0]}")
    tokens, held_out = len(text.train), len(text.held_out)
    ranks = f", {run.settings.parallel}" if world.size > 1 else ""
    show(f"{tokens:,} tokens to train on, {held_out:,} held out; {world.device.type}{ranks}")


def _plot(run: Run, curves: dict, results: dict) -> None:
    settings, folder = run.settings, run.folder
    rows = settings.batch * settings.accumulate
    title = f"{settings.model}, {rows} x {settings.seq} tokens a step"
    plot_losses(folder.plot_path, curves, title, baseline(curves))
    memories = {name: result["memory"] for name, result in results.items()}
    title = f"{settings.model}, {settings.batch} x {settings.seq} tokens a micro-batch"
    plot_memory(folder.memory_plot_path, memories, title, baseline(memories))


def _open(run: Run, stack: ExitStack) -> dict:
    """Makes the folder ready; returns the results of the trainings that are done."""
    settings, folder = run.settings, run.folder
    folder.check(run.configuration, settings.resume, settings.overwrite)
    stack.enter_context(folder.started(run.configuration, settings.resume))
    return folder.results(run.configuration) if settings.resume else {}
