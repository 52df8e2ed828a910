"""The options of `quaver tune`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from .. import optimizers, recipe
from ..errors import UsageError
from ..nn.frozen import FORMATS
from ..settings import FREE, RunSettings

__all__ = ["DTYPES", "METHODS", "RATES", "Settings", "configuration"]

RATES = {"qst": 1e-3, "lora": 2e-4, "full": 2e-5}  # peak learning rates of AdamW
METHODS = tuple(RATES)
DTYPES = ("auto", "bfloat16", "float32")
# Of FREE, what here decides numbers; and paths, whose contents are compared instead.
PATHS = ("model", "eval_data")


@dataclass(frozen=True)
class Settings(RunSettings):
    """The fields are the flags of `quaver tune`. Every method trains on the same batches. `lr` is
    one rate, or {method: rate}; a method without one has its own of RATES, times the optimizer's
    factor. Raises UsageError naming a flag out of range."""

    data: tuple[str, ...] = ()
    model: str = ""
    method: tuple[str, ...] = ("qst",)
    eval_data: tuple[str, ...] | None = None
    held_out: float = 0.05
    prompt_field: str = "prompt"
    response_field: str = "response"
    seq: int = 512
    lr: float | dict[str, float] | None = None
    weight_decay: float = 0.0  # tuning is too short for it
    eval_every: int = 0  # takes as long as dozens of steps
    dtype: str = "auto"
    recipe: str = "bf16"
    optimizer: str = "adamw"
    reduction: int = 16
    adapter: int = 16
    rank: int = 16
    backbone: str = "nf4"
    out: str = "runs/tune"

    def __post_init__(self):
        super().__post_init__()
        for name in ("reduction", "adapter", "rank"):
            self._check_range(name, 1)
        self._check_names("method", _known_method)
        for flag, choices in (("backbone", FORMATS), ("dtype", DTYPES)):
            value = getattr(self, flag)
            if value not in choices:
                raise UsageError(f"--{flag} must be one of {', '.join(choices)}, got {value}")
        if not 0 < self.held_out < 1:
            raise UsageError(f"--held-out must be between 0 and 1, got {self.held_out}")
        for flag, get in (("recipe", recipe.get), ("optimizer", optimizers.rate)):
            try:
                get(getattr(self, flag))
            except ValueError as error:
                raise UsageError(f"--{flag}: {error}") from None
        self._check_recipe()
        self._check_rates()

    def _check_recipe(self) -> None:
        linear = recipe.get(self.recipe).linear
        if linear is not None and linear.master == "f16-tensor":
            raise UsageError(
                f"--recipe {self.recipe} keeps weights as scaled f16, which no folder of "
                "transformers holds; wanted f32, bf16, tensorwise or coat"
            )
        if linear is not None and "lora" in self.method:
            raise UsageError(
                f"--recipe {self.recipe}: the matrices of LoRA are too narrow for FP8; wanted f32 "
                "or bf16 with --method lora"
            )

    def _check_rates(self) -> None:
        rates = self.lr if isinstance(self.lr, dict) else {}
        unknown = [name for name in rates if name not in self.method]
        if unknown:
            raise UsageError(f"--lr gives a rate to {unknown[0]}, which --method does not name")
        for method in self.method:
            self._check_rate(self.rate(method))

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype of the weights; None: the folder's."""
        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    def rate(self, method: str) -> float:
        """The peak learning rate of a method."""
        own = RATES[method] * optimizers.rate(self.optimizer)
        lr = self.lr.get(method) if isinstance(self.lr, dict) else self.lr
        return own if lr is None else lr


def _known_method(name: str) -> None:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")


def configuration(settings: Settings, model: dict, device: str, fingerprint: str) -> dict:
    """All that decides the numbers of a run, as JSON values; see settings.configuration. `model`
    identifies the folder's contents."""
    free = {*FREE, *PATHS, "method"} - {"recipe", "optimizer"}
    return {key: value for key, value in asdict(settings).items() if key not in free} | {
        "data": list(settings.data),
        "betas": list(settings.betas),
        "data_sha256": fingerprint,
        "methods": list(settings.method),
        "lr": {method: settings.rate(method) for method in settings.method},
        "model": model,
        "device": device,
    }
