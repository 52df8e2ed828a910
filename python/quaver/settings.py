"""The options of `quaver train`, and those that every training run has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from . import models, optimizers, recipe
from .data import Data
from .errors import UsageError
from .files import expanded
from .hf.start import Start, load_start
from .parallel import Parallel
from .tokens import Coder, load_coder

__all__ = ["BETAS", "CLIP", "FREE", "SCHEDULES", "WEIGHT_DECAY", "RunSettings", "Settings",
           "coder_of", "configuration", "model_config", "names", "start_of"]  # fmt: skip

# Settings that do not decide the numbers of a run, so that it may be resumed with others, and those
# that `configuration` gives itself.
FREE = ("out", "tokenizer", "text_field", "end_token", "resume", "overwrite",
        "save_every", "eval_every", "tensorboard", "wandb", "probe", "recipe", "optimizer",
        "parallel", "watch")  # fmt: skip
RATE = 1e-3
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP = 1.0
SCHEDULES = ("cosine", "linear", "constant")


def names(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated list."""
    return tuple(name for name in text.split(",") if name)


@dataclass(frozen=True)
class RunSettings:
    """The options of any training run. `batch` is the size of a micro-batch, of which `accumulate`
    make a step. `clip` is the largest norm of the gradient, 0 for none; the held-out loss is taken
    every `eval_every` steps (0: never) and at the end. Raises UsageError naming a flag out of
    range."""

    data: tuple[str, ...] = ("stdlib",)
    steps: int = 300
    batch: int = 8
    seq: int = 256
    accumulate: int = 1
    lr: float | None = None
    warmup: int | None = None
    schedule: str = "cosine"
    weight_decay: float = WEIGHT_DECAY
    betas: tuple[float, float] = BETAS
    clip: float = CLIP
    seed: int = 0
    device: str = "auto"
    out: str = "runs/demo"
    save_every: int = 100
    eval_every: int = 100
    resume: bool = False
    overwrite: bool = False
    tensorboard: bool = False
    wandb: str | None = None
    probe: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "seq", "accumulate", "save_every"):
            self._check_range(name, 1)
        for name in ("probe", "eval_every"):
            self._check_range(name, 0)
        self._check_step()
        if not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"--seed must have at most 63 bits, got {self.seed}")
        if self.warmup is None:
            object.__setattr__(self, "warmup", self.steps // 20)
        if not 0 <= self.warmup < self.steps:
            raise UsageError(f"--warmup must be 0 to {self.steps - 1}, got {self.warmup}")

    def _check_range(self, name: str, least: int) -> None:
        value, flag = getattr(self, name), name.replace("_", "-")
        if not least <= value < 2**31:
            bound = f"at least {least}" if value < least else "below 2^31"
            raise UsageError(f"--{flag} must be {bound}, got {value}")

    def _check_step(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UsageError(
                f"--schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}"
            )
        for name in ("weight_decay", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} must be a number of at least 0, got {value}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            shown = " ".join(map(str, self.betas))
            raise UsageError(f"--betas must be two numbers of 0 to below 1, got {shown}")

    def _check_rate(self, lr: float) -> None:
        if not (math.isfinite(lr) and lr > 0):
            raise UsageError(f"--lr must be a positive number, got {lr}")

    def _check_names(self, flag: str, get: Callable[[str], object]) -> None:
        names = getattr(self, flag)
        if not names:
            raise UsageError(f"--{flag} names none")
        if len(set(names)) != len(names):
            raise UsageError(f"--{flag} names one twice: {','.join(names)}")
        for name in names:
            try:
                get(name)
            except ValueError as error:
                raise UsageError(f"--{flag}: {error}") from None


@dataclass(frozen=True)
class Settings(RunSettings):
    """The fields are the flags of `quaver train`. Ranks share a micro-batch. Every recipe is
    trained with every optimizer; without one (None) with AdamW and its own states; ("all",) is all
    optimizers. `lr` of None is each optimizer's own."""

    tokenizer: str | None = None
    text_field: str = "text"
    end_token: str | None = None
    model: str = "tiny"
    recipe: tuple[str, ...] | None = None
    optimizer: tuple[str, ...] | None = None
    parallel: Parallel | str | None = None
    watch: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._check_range("watch", 0)
        if self.optimizer == ("all",):
            object.__setattr__(self, "optimizer", tuple(optimizers.names()))
        if self.lr is None and self.optimizer is None:
            object.__setattr__(self, "lr", RATE)
        if self.lr is not None:
            self._check_rate(self.lr)
        object.__setattr__(self, "parallel", Parallel.parse(self.parallel))
        if self.batch % self.parallel.data:
            raise UsageError(
                f"--batch {self.batch} does not divide among {self.parallel.data} ranks"
            )
        if self.seq % self.parallel.tensor:
            raise UsageError(f"--seq {self.seq} does not divide among tp={self.parallel.tensor}")
        if self.watch and self.parallel.tensor > 1:
            raise UsageError(f"--watch moves no layers that --parallel {self.parallel} splits")
        if self.recipe is None:
            default = ("bf16", "fp8lm-o2") if self.optimizer is None else ("bf16",)
            object.__setattr__(self, "recipe", default)
        self._check_names("recipe", recipe.get)
        if self.optimizer is not None:
            self._check_names("optimizer", optimizers.rate)

    @property
    def trainings(self) -> list[tuple[str, str | None]]:
        """Each recipe with each optimizer, in the order of training."""
        return [(name, chosen) for name in self.recipe for chosen in self.optimizer or (None,)]

    def rate(self, optimizer: str | None) -> float:
        """The peak learning rate of an optimizer."""
        return RATE * optimizers.rate(optimizer) if self.lr is None else self.lr


def start_of(settings: Settings) -> models.Config | Start:
    """The model of --model: a preset, a JSON file, or a folder of transformers. UsageError for
    another, and for one that --parallel does not split."""
    if not expanded(settings.model).is_dir():
        return models.load(settings.model)
    if settings.parallel.tensor > 1:
        raise UsageError(
            f"--parallel {settings.parallel}: tp splits the models that --model names or a .json "
            "file gives; a folder of transformers takes dp, zero or fsdp"
        )
    return load_start(settings.model, settings.seq)


def coder_of(settings: Settings, start: models.Config | Start) -> Coder | None:
    """The tokenizer of --tokenizer, or of the folder that --model names; None for bytes."""
    if settings.tokenizer is not None:
        return load_coder("--tokenizer", settings.tokenizer, settings.end_token)
    if isinstance(start, Start):
        return load_coder("--model", settings.model, settings.end_token)
    if settings.end_token is not None:
        raise UsageError("--end-token is of a tokenizer, and without --tokenizer tokens are bytes")
    return None


def model_config(
    settings: Settings, config: models.Config | Start, vocab: int
) -> models.Config | Start:
    """The model of `start_of` for data of `vocab` tokens; UsageError if they do not fit."""
    if settings.model in models.PRESETS:
        config = config.replace(vocab=vocab)
    if config.vocab < vocab:
        raise UsageError(f"--model {settings.model}: vocab {config.vocab}, the data needs {vocab}")
    if config.context is not None and config.context < settings.seq:
        raise UsageError(f"--seq {settings.seq} exceeds the model's context {config.context}")
    return config


def configuration(
    settings: Settings, model: models.Config | Start, device: torch.device, text: Data
) -> dict:
    """All that decides the numbers of a run, as JSON values: kept in config.json and in every
    checkpoint, and compared when a run is resumed."""
    config = {key: value for key, value in asdict(settings).items() if key not in FREE} | {
        "data": list(settings.data),
        "betas": list(settings.betas),
        "data_sha256": text.fingerprint,
        "recipes": list(settings.recipe),
        "model": model.as_dict(),
        "device": device.type,
    }
    if settings.optimizer is not None:
        config["optimizers"] = list(settings.optimizer)
        config["lr"] = {name: settings.rate(name) for name in settings.optimizer}
    tensor = settings.parallel.tensor  # each part of the model has a checkpoint of its own
    watch = {"watch": settings.watch} if settings.watch else {}
    return config | ({"tensor_parallel": tensor} if tensor > 1 else {}) | watch
