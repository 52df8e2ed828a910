"""`quaver train`: the same model on the same batches, once for each recipe and optimizer.

One rank or several: they share each micro-batch; the first of them writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch

from . import data, distributed, machine, models
from .assembly import build_optimizer
from .board import writers
from .convert import convert
from .distributed.launch import joined
from .errors import UsageError
from .hf.start import Start
from .interrupt import Interrupted, stop_signals
from .job import Job, Run, finished
from .optimizers import label
from .plot import plot_losses, plot_memory
from .progress import baseline, check_installed, samples, table
from .recipe import get
from .rundir import RunDir
from .settings import Settings, coder_of, configuration, model_config, start_of

__all__ = ["Interrupted", "Settings", "run"]


def run(settings: Settings) -> dict:
    """Trains every recipe and optimizer of `settings` and returns the summary, which is also
    in OUT/summary.json.

    Raises UsageError, before anything is written, for settings that cannot work, and Interrupted
    after saving when SIGINT or SIGTERM asked to stop.
    """
    check_installed("train")
    device = machine.choose_device(settings.device)
    logs = writers(settings)
    with _world(settings, device) as world:
        return _run(settings, world, logs)


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


def _run(settings: Settings, world: distributed.World, logs: tuple[Callable, ...]) -> dict:
    start = start_of(settings)  # before the data is read, which takes longer
    coder = coder_of(settings, start)
    text = data.load(settings.data, settings.seq, coder, settings.text_field)
    model = model_config(settings, start, text.vocab)
    config = configuration(settings, model, world.device, text)
    world.agree({"--data": text.fingerprint, "--model": model.as_dict()})
    run = Run(settings, model, text, world, RunDir(settings.out), config, logs)
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
    show(f"\n{samples(results)}\n\n{table(results)}\n\n{'  '.join(map(str, paths))}")
    return summary


def _check_optimizers(run: Run) -> None:
    """Builds each optimizer for a model of one layer, or one without memory: what one of them
    refuses is an error before anything is written, and not after the others have trained."""
    for name, optimizer in run.settings.trainings:
        if optimizer is None and run.world.size == 1:
            continue  # any recipe's own steps there
        if isinstance(run.model, models.Config):
            Job(replace(run, model=run.model.replace(layers=1)), name, optimizer)
            continue
        settings, chosen = replace(run.settings, lr=run.settings.rate(optimizer)), get(name)
        model = convert(run.model.skeleton(), chosen)
        build_optimizer(settings, run.model, chosen, run.world, model, optimizer)


def _show_data(run: Run, show: Callable) -> None:
    text, world = run.text, run.world
    if str(text.notes):
        show(text.notes)
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


def _keep(run: Run, folder: Path) -> None:
    """The files of the run's base/: its tokenizer, and the config of the folder that it starts
    from."""
    run.text.coder.save(folder)
    if isinstance(run.model, Start):
        run.model.save(folder)


def _open(run: Run, stack: ExitStack) -> dict:
    """Makes the folder ready; returns the results of the trainings that are done."""
    settings, folder = run.settings, run.folder
    folder.check(run.configuration, settings.resume, settings.overwrite)
    kept = None if run.text.coder is None else partial(_keep, run)
    stack.enter_context(folder.started(run.configuration, settings.resume, kept))
    return folder.results(run.configuration) if settings.resume else {}
