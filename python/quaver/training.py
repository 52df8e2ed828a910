"""One training of a run: its steps, its checkpoints, its result.

Everything that a step needs is a function of the configuration, the step and the checkpoint, so a
run that was killed continues with the same bits.
"""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from . import distributed, machine
from .activations import saved_activations
from .board import Board
from .checkpoint import step_of
from .comm.together import together
from .convert import convert_report
from .errors import CheckpointError, UsageError
from .files import sync
from .grad import clip_grad_norm_
from .interrupt import Interrupted
from .memory import memory_report
from .metrics import Metrics
from .probe import Probe
from .progress import Progress
from .rundir import RunDir, changes
from .schedule import learning_rate
from .schema import SchemaError, check
from .settings import RunSettings
from .watching import Watch

__all__ = ["Run", "Training", "finished", "finite"]

LAST = 0.05  # part of the steps over which the training loss is averaged
NOTES = {"skipped": int, "metrics_crc32": int, "recipe": str, "configuration": dict}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Run:
    """The values that all trainings of a run share. `model` is what each builds its model from,
    `text` what it takes batches from. `configuration` is kept in every checkpoint;
    `writers` make the logs that are wanted (board.writers)."""

    settings: RunSettings
    model: object
    text: object
    world: distributed.World
    folder: RunDir | None = None
    configuration: dict = field(default_factory=dict)
    writers: tuple[Callable, ...] = ()

    @property
    def writes(self) -> bool:
        return self.world.rank == 0


def finished(run: Run, name: str, result: dict) -> list[dict]:
    """The metrics of all steps of a training that has its `result`."""
    steps, crc32 = run.settings.steps, result["metrics_crc32"]
    with Metrics(run.folder.metrics_path(name), steps, crc32, run.writes) as metrics:
        return metrics.lines


class Training:
    """A training called `name` of a run, on this rank.

    A subclass makes `model` and `optimizer` and gives `_batch`, `_loss`, `_tokens`, `_validate`,
    `_sample` and `_own`. `settings.lr` is the training's own peak rate.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    watch: Watch | None = None

    def __init__(self, run: Run, name: str, settings: RunSettings):
        self.run, self.world, self.name, self.settings = run, run.world, name, settings
        self.device = run.world.device
        self.parallel = self.transport = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def kept(self) -> nn.Module:
        """The module whose values are kept in checkpoints."""
        return self.model

    def _batch(self, step: int, micro: int) -> list[Tensor]:
        """This rank's part of a micro-batch: the arguments of `_loss`."""
        raise NotImplementedError

    def _loss(self, *batch: Tensor) -> Tensor:
        """The mean loss of a micro-batch."""
        raise NotImplementedError

    def _tokens(self, step: int) -> int:
        """The tokens of a step, of all ranks."""
        raise NotImplementedError

    def _validate(self) -> float | None:
        """The mean loss of the held-out data; None where it is not finite."""
        raise NotImplementedError

    def _sample(self) -> dict[str, str]:
        """A held-out text, cut: "prompt", the "wanted" rest, and the model's own as "answer"."""
        raise NotImplementedError

    def _own(self, configuration: dict, name: str) -> dict:
        """The part of a run's configuration that this training depends on, with its name."""
        raise NotImplementedError

    def _set_rate(self, lr: float) -> None:
        """Sets the learning rate of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def train(self, stop: threading.Event) -> tuple[dict, list[dict]]:
        """Trains from the checkpoint, or from the start. Returns the result and the metrics of all
        steps. Raises Interrupted, after saving, on the step after `stop` was set."""
        run, name, settings = self.run, self.name, self.settings
        report = convert_report(self.model)
        if report.converted and run.writes:
            print(f"{name} {report}")
        notes = self._load() if settings.resume else None
        start, skipped, crc32 = notes or (0, 0, 0)
        with ExitStack() as stack:
            path = run.folder.metrics_path(name)
            metrics = stack.enter_context(Metrics(path, start, crc32, run.writes))
            progress = stack.enter_context(Progress(name, start, settings.steps, run.writes))
            if start:
                progress.say(f"{name} continues after step {start}")
            folder = run.folder.tensorboard_path(name)
            logs = run.writers if run.writes else ()
            board = stack.enter_context(Board(logs, name, folder, run.configuration, start))
            for step in range(start + 1, settings.steps + 1):
                line = self.step(step)
                asked = self._agree(line, stop)
                line["skipped"] = skipped + self.optimizer.skipped
                if self._evaluates(step):
                    with machine.bf16_products(self.device):
                        line["val_loss"] = self._validate()
                metrics.write(line)
                for module, plain in line.get("watch", {}).get("moved", {}).items():
                    where = "computes in bf16" if plain else "computes in FP8 again"
                    progress.say(f"{name} step {step}: {module} {where}")
                progress.step(step, line)
                board.write(line)
                if asked or step % settings.save_every == 0 or step == settings.steps:
                    self._save(step, metrics)
                if asked and step < settings.steps:
                    progress.say(f"{name} stopped after step {step}; --resume continues")
                    raise Interrupted
        result = self._result(metrics)
        if any(self.world.all_gather(stop.is_set())):
            raise Interrupted
        return result, metrics.lines

    def _evaluates(self, step: int) -> bool:
        every = self.settings.eval_every
        return step == self.settings.steps or (every > 0 and step % every == 0)

    @property
    def _checkpoint(self) -> Path:
        tensor = self.world.tensor
        parts = () if tensor is None else (tensor.rank, tensor.size)
        return self.run.folder.checkpoint_path(self.name, *parts)

    @property
    def _next(self) -> Path:
        """The path of a checkpoint's part until all ranks have written theirs."""
        return self._checkpoint.with_suffix(".next.safetensors")

    def _save(self, step: int, metrics: Metrics) -> None:
        metrics.sync()
        parts = self.world.tensor is not None
        path = self._next if parts else self._checkpoint
        extra = {
            "skipped": metrics.lines[-1]["skipped"],
            "metrics_crc32": self.world.all_gather(metrics.crc32)[0],  # rank 0 writes the file
            "recipe": self.name,
            "configuration": self.run.configuration,
        }
        distributed.save(
            path, self.kept, self.optimizer, parallel=self.parallel, step=step, extra=extra
        )
        if parts:
            self.world.all_gather(step)  # only when every rank has this step may the older one go
            if self.world.data_rank == 0:
                os.replace(path, self._checkpoint)
                sync(path.parent)

    def _saved(self) -> Path | None:
        """The file to continue from; None to start. Where each rank saves a part and some were
        killed between the parts, it is of the newest step that all ranks have."""
        if self.world.tensor is None:
            path = self._checkpoint
            return path if any(self.world.all_gather(path.exists())) else None
        with together(self.world.transport, self.device):
            paths = [path for path in (self._next, self._checkpoint) if path.exists()]
            steps = {step_of(path): path for path in paths}
        every = self.world.all_gather([list(steps), self._checkpoint.exists()])
        common = set(steps).intersection(*(found for found, _ in every))
        if common:
            return steps[max(common)]
        if any(whole for _, whole in every):
            parts = ", ".join(
                str(step) for step in sorted({s for found, _ in every for s in found})
            )
            raise UsageError(
                f"the parts of the checkpoint of {self.name} are of several steps: {parts}"
            )
        return None  # killed in the first save

    def _load(self) -> tuple[int, int, int] | None:
        """Restores the checkpoint, if there is one: its step, the steps skipped until then, and the
        checksum of their metrics. An error on one rank is one on all."""
        path = self._saved()
        if path is None:
            return None
        with together(self.world.transport, self.device):
            try:
                state = distributed.load(path, self.kept, self.optimizer, parallel=self.parallel)
                self._check_notes(state["extra"])
            except CheckpointError as error:
                hint = f"without the file {self.name} starts anew"
                raise UsageError(f"{error}; {hint}") from None
            extra = state["extra"]
        return state["step"], extra["skipped"], extra["metrics_crc32"]

    def _check_notes(self, extra: object) -> None:
        """Checks that the checkpoint is of this run: same seed, data, rates, recipe, optimizer."""
        try:
            check(extra, NOTES, "extra")
        except SchemaError as error:
            raise CheckpointError(f"{self._checkpoint}: not of a run: {error}") from None
        old = self._own(extra["configuration"], extra["recipe"])
        new = self._own(self.run.configuration, self.name)
        found = changes(old, new)
        if found:
            raise UsageError(f"--resume: {self._checkpoint} is of a run with {', '.join(found)}")

    def _agree(self, line: dict, stop: threading.Event) -> bool:
        """Replaces the loss by the mean over ranks; returns whether any of them is to stop."""
        found = self.world.all_gather([line["loss"], stop.is_set()])
        losses = [loss for loss, _ in found]
        line["loss"] = None if None in losses else statistics.fmean(losses)
        return any(asked for _, asked in found)

    # One step

    def _traffic(self) -> dict[str, int]:
        """Bytes that this rank sent so far, by kind."""
        transports = [t for t in (self.transport, self.world.tensor) if t]
        return {kind: sum(t.traffic[kind] for t in transports) for kind in distributed.KINDS}

    def step(self, step: int) -> dict:
        """One optimizer step; returns its line of metrics."""
        settings, began, before = self.settings, time.perf_counter(), self._traffic()
        lr = learning_rate(step, settings)
        self._set_rate(lr)
        probed = settings.probe and step % settings.probe == 0
        probe = Probe(self.model, self.optimizer) if probed else None
        total = self._backward(step, probe)
        norm = self._clip()
        if probe:
            probe.before_update()
        self.optimizer.step()
        measured = {"probe": probe.after_update()} if probe else {}
        if self.watch and self.watch.step():
            measured["watch"] = {"plain": self.watch.plain, "moved": self.watch.moved}
        value = total.item()  # waits for the device, so the time is that of the whole step
        line = {
            "step": step,
            "loss": finite(value),
            "lr": lr,
            "grad_norm": finite(float(norm)),
            "tokens_per_s": self._tokens(step) / (time.perf_counter() - began),
        } | measured
        if self.transport:
            after = self._traffic()
            line["communication"] = {kind: after[kind] - before[kind] for kind in after}
        return line

    def _backward(self, step: int, probe: Probe | None) -> Tensor:
        """The loss of all micro-batches, whose gradients are then in `.grad`."""
        self.optimizer.zero_grad(set_to_none=True)
        total, count = (
            torch.zeros((), dtype=torch.float32, device=self.device),
            self.settings.accumulate,
        )
        for micro in range(count):
            with machine.bf16_products(self.device), ExitStack() as stack:
                if self.parallel and micro + 1 < count:
                    stack.enter_context(self.parallel.no_sync())
                if probe and micro == 0:
                    stack.enter_context(probe.watching())
                loss = self._loss(*self._batch(step, micro)) / count
                loss.backward()
            total += loss.detach()
        return total

    def _clip(self) -> Tensor:
        limit = self.settings.clip or math.inf
        if isinstance(self.optimizer, distributed.ZeroAdamW):
            return self.optimizer.clip_grad_norm_(limit)
        return clip_grad_norm_(self.model.parameters(), limit)

    # The result

    def _memory(self) -> dict:
        """The mean over ranks, measured on a micro-batch of its own after training, so that
        resumption does not matter."""
        self.optimizer.zero_grad(set_to_none=True)
        with saved_activations(self.model) as saved:
            loss = self._loss(*self._batch(self.settings.steps, 0))
        loss.backward()
        return self.world.mean(memory_report(self.model, self.optimizer, activations=saved))

    def _peak_memory(self) -> int | None:
        """The most bytes that this training had on the GPU at once; None on the CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device)

    def _result(self, metrics: Metrics) -> dict:
        lines = metrics.lines
        last = [line["loss"] for line in lines[-max(1, round(len(lines) * LAST)) :]]
        sent = [line.get("communication", {}) for line in lines]
        with machine.bf16_products(self.device):
            memory, sample = self._memory(), self._sample()
        return {
            "final_loss": None if None in last else statistics.fmean(last),
            "val_loss": lines[-1]["val_loss"],
            "sample": sample,
            "tokens_per_s": statistics.median(line["tokens_per_s"] for line in lines),
            "memory": memory,
            "peak_memory": self._peak_memory(),
            "communication": {k: sum(s.get(k, 0) for s in sent) for k in distributed.KINDS},
            "steps": len(lines),
            "skipped": lines[-1]["skipped"],
            "nonfinite_losses": sum(line["loss"] is None for line in lines),
            "metrics_crc32": self.world.all_gather(metrics.crc32)[0],
        }
