"""One recipe of a run: its model and optimizer, its steps, its result.

Everything that a step needs is a function of the configuration, the step and the checkpoint, so a
run that was killed continues with the same bits.
"""

import math
import statistics
import time
from contextlib import ExitStack

import torch
import torch.nn.functional as F

import quaver as qv
from quaver import distributed, machine, models, recipe
from quaver.distributed.launch import parse_parallel
from quaver.errors import UsageError
from quaver.probe import Probe
from quaver.progress import Progress
from quaver.rundir import Metrics

__all__ = ["Interrupted", "Job", "learning_rate", "parameter_groups"]

CLIP = 1.0
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
LAST = 0.05  # part of the steps over which the final loss is taken


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


def learning_rate(step, settings):
    """The rate of step 1..steps: a linear warmup, then a cosine down to a tenth."""
    if step <= settings.warmup:
        return settings.lr * step / settings.warmup
    progress = (step - settings.warmup) / (settings.steps - settings.warmup)
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model):
    """Weight decay for matrices alone: it pulls norms and biases to values that mean nothing."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _probe_scalars(probe):
    """("probe/TENSOR/FIGURE", number) for every figure that a probe has."""
    for tensor, figures in probe.items():
        k = figures.get("k", {})
        for key, value in (figures | {f"k_{part}": k[part] for part in k}).items():
            if isinstance(value, float):
                yield f"probe/{tensor}/{key}", value


def _finite(value):
    return value if math.isfinite(value) else None


class Job:
    """What all recipes of a run share. `writer` makes TensorBoard logs of a folder, if any."""

    def __init__(self, settings, model_config, text, device, folder=None, writer=None, world=None):
        self.settings, self.model_config, self.text = settings, model_config, text
        self.device, self.folder, self.writer = device, folder, writer
        self.world = world or distributed.World(device)
        self.parallel = self.transport = None

    def train(self, name, stop, done=None):
        """Trains recipe `name` from its checkpoint, or from the start. Returns its result and the
        losses of all steps. With `done`, an earlier result, only reads the losses."""
        settings, world = self.settings, self.world
        writes = world.rank == 0
        path = self.folder.metrics_path(name)
        if done is not None:
            with Metrics(path, settings.steps, writes) as metrics:
                return done, [line["loss"] for line in metrics.lines]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        model, optimizer = self.build(name)
        report = qv.convert_report(model)
        if report.converted and writes:
            print(f"{name} {report}")
        if world.size > 1:
            self._connect(model, optimizer)
        parts = () if world.tensor is None else (world.tensor.rank, world.tensor.size)
        checkpoint = self.folder.checkpoint_path(name, *parts)
        start, skipped = 0, 0
        if settings.resume and any(world.share(checkpoint.exists())):
            state = self._load(name, checkpoint, model, optimizer)
            start, skipped = state["step"], state["extra"]["skipped"]
        with ExitStack() as stack:
            metrics = stack.enter_context(Metrics(path, start, writes))
            progress = stack.enter_context(Progress(name, start, settings.steps, writes))
            if start:
                progress.say(f"{name} continues after step {start}")
            board = None
            if self.writer is not None and writes:
                board = self.writer(self.folder.tensorboard_path(name), purge_step=start + 1)
                stack.callback(board.close)
            for step in range(start + 1, settings.steps + 1):
                line = self.step(name, model, optimizer, step)
                asked = self._agree(line, stop)
                line["skipped"] = skipped + optimizer.skipped
                metrics.write(line)
                progress.step(step, line)
                if board:
                    for key in ("loss", "lr", "grad_norm", "tokens_per_s"):
                        if line[key] is not None:
                            board.add_scalar(key, line[key], step)
                    for key, value in _probe_scalars(line.get("probe", {})):
                        board.add_scalar(key, value, step)
                if asked or step % settings.save_every == 0 or step == settings.steps:
                    metrics.sync()
                    extra = {"skipped": line["skipped"]}
                    distributed.save(
                        checkpoint, model, optimizer, parallel=self.parallel, step=step, extra=extra
                    )
                if asked and step < settings.steps:
                    progress.say(f"{name} stopped after step {step}; --resume continues")
                    raise Interrupted
        result = self._result(name, model, optimizer, metrics.lines)
        self.parallel = self.transport = None
        if any(world.share(stop.is_set())):
            raise Interrupted
        return result, [line["loss"] for line in metrics.lines]

    def _load(self, name, checkpoint, model, optimizer):
        """The checkpoint's step and notes. An error on one rank is one on all."""
        state = error = None
        try:
            state = distributed.load(checkpoint, model, optimizer, parallel=self.parallel)
        except qv.CheckpointError as found:
            error = f"{found}; without the file {name} starts anew"
        texts, steps = zip(*self.world.share([error, state and state["step"]]), strict=True)
        if any(texts):
            raise UsageError(error or next(text for text in texts if text)) from None
        if len(set(steps)) > 1:
            parts = ", ".join(map(str, sorted(set(steps))))
            raise UsageError(f"the parts of the checkpoint of {name} are of several steps: {parts}")
        return state

    def _agree(self, line, stop):
        """Makes the loss that of all ranks; whether one of them was asked to stop."""
        found = self.world.share([line["loss"], stop.is_set()])
        losses = [loss for loss, _ in found]
        line["loss"] = None if None in losses else statistics.fmean(losses)
        return any(asked for _, asked in found)

    def build(self, name):
        torch.manual_seed(self.settings.seed)
        # Initialised on the CPU: the same values whatever the device.
        model = models.build(self.model_config).to(self.device)
        model = qv.convert(model, recipe=name)
        chosen, world = recipe.get(name), self.world
        parallel = parse_parallel(self.settings.parallel)
        if world.tensor is not None:
            try:
                distributed.parallelize(model, world.tensor, fp8_sum=chosen.fp8_sum)
            except ValueError as error:
                raise UsageError(f"--parallel {self.settings.parallel}: {error}") from None
        fsdp = "fsdp" in parallel and world.size > 1
        if fsdp:
            self._shard(model, chosen)
        options = {"lr": self.settings.lr, "betas": BETAS, "recipe": name}
        if "zero" in parallel or (chosen.replica and not fsdp):
            options["group"] = world.data_group
            return model, distributed.ZeroAdamW(parameter_groups(model), **options)
        return model, qv.AdamW(parameter_groups(model), **options)

    def _traffic(self):
        """Bytes that this rank sent so far, by kind."""
        transports = [t for t in (self.transport, self.world.tensor) if t]
        return {kind: sum(t.traffic[kind] for t in transports) for kind in distributed.KINDS}

    def _shard(self, model, chosen):
        if chosen.linear is not None:
            try:
                distributed.fully_shard(model)
            except ValueError as error:
                raise UsageError(f"--parallel {self.settings.parallel}: {error}") from None
            return
        # What FSDP2 does without FP8: weights and gradients travel in the autocast dtype.
        from torch.distributed.fsdp import MixedPrecisionPolicy  # a second to import

        low = chosen.autocast == torch.bfloat16
        policy = MixedPrecisionPolicy(param_dtype=chosen.autocast, reduce_dtype=torch.float32)
        distributed.fully_shard(model, gradient="bf16" if low else "f32", mp_policy=policy)

    def _connect(self, model, optimizer):
        """After `build`: what averages gradients, unless FSDP2 does, and what counts the bytes."""
        if "fsdp" in parse_parallel(self.settings.parallel):
            self.transport = distributed.transport_of(model)
        else:
            self.parallel = distributed.ddp(model, optimizer=optimizer, group=self.world.data_group)
            self.transport = self.parallel.transport

    def _loss(self, name, model, inputs, targets):
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        dtype = recipe.get(name).autocast
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            logits = model(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def _batch(self, step, micro):
        """This rank's part of a micro-batch."""
        settings, world = self.settings, self.world
        whole = self.text.batch(settings.seed, step, settings.batch, settings.seq, micro)
        rows = settings.batch // world.data_size
        return [part[world.data_rank * rows : (world.data_rank + 1) * rows] for part in whole]

    def step(self, name, model, optimizer, step):
        """One optimizer step; returns its line of metrics."""
        settings = self.settings
        began = time.perf_counter()
        lr = learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        before = self._traffic()
        probed = settings.probe and step % settings.probe == 0
        probe = Probe(model, optimizer) if probed else None
        for micro in range(settings.accumulate):
            with machine.bf16_products(self.device), ExitStack() as stack:
                if self.parallel and micro + 1 < settings.accumulate:
                    stack.enter_context(self.parallel.no_sync())
                if probe and micro == 0:
                    stack.enter_context(probe.watching())
                loss = self._loss(name, model, *self._batch(step, micro)) / settings.accumulate
                loss.backward()
            total += loss.detach()
        if isinstance(optimizer, distributed.ZeroAdamW):
            norm = optimizer.clip_grad_norm_(CLIP)
        else:
            norm = qv.clip_grad_norm_(model.parameters(), CLIP)
        if probe:
            probe.before_update()
        optimizer.step()
        measured = {"probe": probe.after_update()} if probe else {}
        value = total.item()  # waits for the device, so the time is that of the whole step
        tokens = settings.batch * settings.seq * settings.accumulate
        line = {
            "step": step,
            "loss": _finite(value),
            "lr": lr,
            "grad_norm": _finite(float(norm)),
            "tokens_per_s": tokens / (time.perf_counter() - began),
        } | measured
        if self.transport:
            after = self._traffic()
            line["communication"] = {kind: after[kind] - before[kind] for kind in after}
        return line

    @torch.no_grad()
    def _validate(self, name, model):
        """Ranks take turns with the batches, which are those of one process."""
        model.eval()
        found = {}
        batches = list(self.text.validation(self.settings.batch, self.settings.seq))
        # The same number on every rank, because forwards of a sharded model are collective: whose
        # turn does not come again does an earlier batch again.
        for turn in range(0, len(batches), self.world.data_size):
            i = min(turn + self.world.data_rank, len(batches) - 1)
            inputs, targets = batches[i]
            loss = self._loss(name, model, inputs, targets).item()
            found[str(i)] = (loss * len(inputs), len(inputs))
        model.train()
        everywhere = {int(i): pair for part in self.world.share(found) for i, pair in part.items()}
        pairs = [everywhere[i] for i in range(len(everywhere))]
        return _finite(sum(total for total, _ in pairs) / sum(count for _, count in pairs))

    def _memory(self, name, model, optimizer):
        """The mean over ranks, measured on a micro-batch of its own after training, so that
        resumption does not matter."""
        optimizer.zero_grad(set_to_none=True)
        with qv.saved_activations(model) as saved:
            loss = self._loss(name, model, *self._batch(self.settings.steps, 0))
        loss.backward()
        return self.world.mean(qv.memory_report(model, optimizer, activations=saved))

    def _peak_memory(self):
        """The most bytes that this recipe had on the GPU at once; None on the CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device)

    def _result(self, name, model, optimizer, lines):
        last = [line["loss"] for line in lines[-max(1, round(len(lines) * LAST)) :]]
        sent = [line.get("communication", {}) for line in lines]
        with machine.bf16_products(self.device):
            val_loss = self._validate(name, model)
            memory = self._memory(name, model, optimizer)
        return {
            "final_loss": None if None in last else statistics.fmean(last),
            "val_loss": val_loss,
            "tokens_per_s": statistics.median(line["tokens_per_s"] for line in lines),
            "memory": memory,
            "peak_memory": self._peak_memory(),
            "communication": {k: sum(s.get(k, 0) for s in sent) for k in distributed.KINDS},
            "steps": len(lines),
            "skipped": lines[-1]["skipped"],
            "nonfinite_losses": sum(line["loss"] is None for line in lines),
        }
