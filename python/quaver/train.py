"""`quaver train`: the same model on the same batches, once for each recipe, on one rank or several.

Everything that a step needs is a function of the configuration, the step and the checkpoint, so a
run that was killed continues with the same bits. Ranks share each micro-batch; the first writes.
"""

import math
import os
import signal
import statistics
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

import quaver as qv
from quaver import data, distributed, machine, models, recipe
from quaver.distributed.launch import parse_parallel
from quaver.errors import UsageError
from quaver.plot import plot_losses, plot_memory
from quaver.probe import Probe
from quaver.progress import Progress, baseline, table
from quaver.rundir import Metrics, RunDir

__all__ = ["Interrupted", "Job", "Settings", "learning_rate", "run"]

CLIP = 1.0
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
LAST = 0.05  # part of the steps over which the final loss is taken


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


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


def learning_rate(step, settings):
    """The rate of step 1..steps: a linear warmup, then a cosine down to a tenth."""
    if step <= settings.warmup:
        return settings.lr * step / settings.warmup
    progress = (step - settings.warmup) / (settings.steps - settings.warmup)
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


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


def _groups(model):
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
            return model, distributed.ZeroAdamW(_groups(model), **options)
        return model, qv.AdamW(_groups(model), **options)

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
