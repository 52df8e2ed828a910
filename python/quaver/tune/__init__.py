"""`quaver tune`: a model of transformers, finetuned on instruction data by one method or several,
each on the same batches."""

from __future__ import annotations

import os
from dataclasses import replace

from .. import distributed, machine
from ..board import writers
from ..errors import UsageError
from ..hf import folder as hf_folder
from ..interrupt import stop_signals
from ..plot import plot_losses, plot_memory
from ..progress import check_installed, samples
from ..rundir import RESULT, Kind, RunDir
from ..training import Run, finished
from . import chat, methods
from .job import Tuning, held_out_loss
from .report import table
from .settings import METHODS, RATES, Settings, configuration

__all__ = ["METHODS", "RATES", "Settings", "run"]

KIND = Kind("methods", lambda: METHODS, RESULT | {"trained": int})


def run(settings: Settings) -> dict:
    """Tunes by every method of `settings` and returns the summary, which is also in
    OUT/summary.json.

    Raises UsageError, before anything is written, for settings, data or a folder that cannot work,
    and Interrupted after saving when SIGINT or SIGTERM asked to stop.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
        raise UsageError(f"tune is one process, {os.environ['WORLD_SIZE']} were started")
    check_installed("tune")
    world = distributed.World(machine.choose_device(settings.device))
    logs = writers(settings)
    config = hf_folder.load_config(settings.model, settings.seq)
    tokenizer = hf_folder.load_tokenizer(settings.model)
    _check_methods(settings, config, tokenizer, world)
    text = chat.load(settings, tokenizer)
    untouched = _untouched(settings, config, text, world)
    identity = hf_folder.identity(settings.model, config)
    device = world.device.type
    run = Run(
        settings=settings,
        model=tokenizer,
        text=text,
        world=world,
        folder=RunDir(settings.out, KIND),
        configuration=configuration(settings, identity, device, text.fingerprint),
        writers=logs,
    )
    run.folder.check(run.configuration, settings.resume, settings.overwrite)
    with run.folder.started(run.configuration, settings.resume):
        return _run(run, untouched)


def _check_methods(settings: Settings, config, tokenizer, world: distributed.World) -> None:
    """Builds each method on the model without memory: what one of them refuses is an error before
    anything is written, and not after the others have trained."""
    made = hf_folder.skeleton(config, settings.torch_dtype)
    hf_folder.check_model(settings.model, made, len(tokenizer))
    for method in settings.method:
        own = replace(settings, lr=settings.rate(method))
        model = methods.build(method, hf_folder.skeleton(config, own.torch_dtype), own)
        methods.build_optimizer(model, own, world)


def _untouched(
    settings: Settings, config, text: chat.Chat, world: distributed.World
) -> float | None:
    model = hf_folder.load_model(settings.model, config, settings.torch_dtype).to(world.device)
    return held_out_loss(model, text, settings.batch, settings.recipe)


def _run(run: Run, untouched: float | None) -> dict:
    settings, folder = run.settings, run.folder
    _show_data(run, untouched)
    results = folder.results(run.configuration) if settings.resume else {}
    summary = {
        "methods": results,
        "untouched": untouched,
        "machine": machine.describe(),
        "config": run.configuration,
    }
    curves = {}
    with stop_signals() as stop:
        for method in settings.method:
            if method in results:
                curves[method] = finished(run, method, results[method])
            else:
                results[method], curves[method] = Tuning(run, method).train(stop)
            folder.write_summary(summary)
    title = f"{settings.batch * settings.accumulate} conversations a step"
    plot_losses(folder.plot_path, curves, title, settings.method[0])
    memories = {name: result["memory"] for name, result in results.items()}
    plot_memory(folder.memory_plot_path, memories, title, settings.method[0])
    paths = (folder.summary_path, folder.plot_path, folder.memory_plot_path)
    paths += tuple(folder.tuned_path(method) for method in settings.method)
    print(f"\n{samples(results)}\n\n{table(results, untouched)}\n\n{'  '.join(map(str, paths))}")
    return summary


def _show_data(run: Run, untouched: float | None) -> None:
    text = run.text
    if str(text.notes):
        print(text.notes)
    answers = sum(example.answers for example in text.train)
    loss = "nan" if untouched is None else f"{untouched:.4f}"
    print(
        f"{len(text.train):,} examples to train on, {answers:,} tokens in their answers; "
        f"{len(text.held_out):,} held out, untouched loss {loss}; {run.world.device.type}"
    )
