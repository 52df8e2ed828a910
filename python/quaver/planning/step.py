"""One training step as `quaver train` takes it, of a model without storage or with one."""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import distributed
from ..activations import saved_activations
from ..errors import UsageError
from ..grad import clip_grad_norm_
from ..memory import fp8_copies, memory_report
from ..nn import LinearBase
from ..optim import release_gradients
from ..settings import CLIP
from ..tensor import ScaledTensor
from .ledger import Ledger, Peak

__all__ = ["Training", "materialise", "measure", "recompute_blocks"]


@dataclass
class Training:
    """A model of that `name`, which gives logits [batch, length, vocab] of tokens [batch, length]
    or has them in its result's `logits`, and its optimizer. `autocast` is the dtype of one, or
    None. `released`: backward updates (`release_gradients`) and nothing is clipped. `links` count
    the messages of its ranks."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    name: str
    autocast: torch.dtype | None
    released: bool = False
    links: tuple[distributed.Transport, ...] = ()

    def __post_init__(self):
        if self.released:
            try:
                release_gradients(self.model, self.optimizer)
            except (TypeError, ValueError) as error:
                raise UsageError(f"plan: {error}") from None

    def loss(self, tokens: Tensor) -> Tensor:
        dtype = self.autocast
        with torch.autocast(tokens.device.type, dtype, enabled=dtype is not None):
            logits = self._logits(tokens)
        torch.clear_autocast_cache()  # which would keep its casts inside of another autocast
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    def _logits(self, tokens: Tensor) -> Tensor:
        # A key-value cache, which transformers' models return by default, is no part of a step.
        cached = getattr(getattr(self.model, "config", None), "use_cache", None)
        options = {} if cached is None else {"use_cache": False}
        try:
            out = self.model(tokens, **options)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"plan: {self.name} does not run on tokens {list(tokens.shape)}: {reason}"
            ) from error
        logits = getattr(out, "logits", out)
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            raise UsageError(
                f"plan: {self.name} gives {type(out).__name__}; wanted logits [batch, length, "
                "vocab] of tokens [batch, length]"
            )
        return logits

    def states(self) -> list[Tensor]:
        """The tensors that the optimizer keeps."""
        values = [v for state in self.optimizer.state.values() for v in state.values()]
        return [v for v in values if isinstance(v, Tensor)]

    def traffic(self) -> dict[str, int]:
        """Bytes that this rank has sent, by kind."""
        return {kind: sum(link.traffic[kind] for link in self.links) for kind in distributed.KINDS}

    def messages(self) -> int:
        """The number of messages that this rank has started."""
        return sum(link.messages for link in self.links)

    def clip(self) -> None:
        if isinstance(self.optimizer, distributed.ZeroAdamW):
            self.optimizer.clip_grad_norm_(CLIP)
        elif not self.released:
            clip_grad_norm_(self.model.parameters(), CLIP)


def measure(training: Training, batch: int, length: int) -> tuple[dict, Peak]:
    """The memory report and the peak of two steps, of which the first makes the states. The report
    has a step's "communication" and "messages" too. On fake tensors in their mode, else for
    real."""
    model, optimizer = training.model, training.optimizer
    ledger = Ledger(model)
    ledger.mark("states", training.states())
    ledger.mark("weights", [*model.parameters(), *model.buffers()])
    ledger.mark("copies", [copy for m in model.modules() for copy in fp8_copies(m)])
    report = {}
    with ledger.following(), warnings.catch_warnings():
        # Of a recipe that the optimizer does not share, which is the caller's choice here.
        warnings.filterwarnings("ignore", message=".*steps converted weights by")
        for last in (False, True):
            before, started = training.traffic(), training.messages()
            ledger.phase = "forward"
            tokens = torch.zeros(batch, length, dtype=torch.int64)
            with saved_activations(model) if last else nullcontext() as saved:
                loss = training.loss(tokens)
            ledger.phase = "backward"
            loss.backward()
            ledger.mark("gradients", [p.grad for p in model.parameters()])
            ledger.phase = "clip"
            training.clip()
            ledger.phase = "step"
            optimizer.step()
            ledger.mark("states", training.states())
            ledger.mark("weights", model.parameters())  # a state may be a weight's master
            if last:
                report = memory_report(model, optimizer, saved)
                sent = training.traffic()
                report["communication"] = {kind: sent[kind] - before[kind] for kind in sent}
                report["messages"] = training.messages() - started
            optimizer.zero_grad(set_to_none=True)
            del loss, tokens
    return report, ledger.peak()


def recompute_blocks(model: nn.Module) -> None:
    """Keeps the inputs of each element of the outermost lists of modules alone for backward.
    UsageError where the model has no such list."""
    lists: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            lists.append(name)
    blocks = [b for name in lists for b in model.get_submodule(name) if list(b.parameters())]
    if not blocks:
        raise UsageError(
            "plan: recompute wants a model with a list of blocks (nn.ModuleList), which this one "
            "does not have; leave it out"
        )
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def materialise(model: nn.Module) -> None:
    """Gives every parameter and buffer of a model on the meta device a storage of the
    FakeTensorMode in force. Parameters that are one stay one."""
    made: dict[int, Tensor] = {}

    def storage(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype)

    def replace(t: Tensor) -> Tensor:
        if id(t) not in made:
            new = t._map(storage) if isinstance(t, ScaledTensor) else storage(t)
            if isinstance(t, nn.Parameter):
                new = nn.Parameter(new, requires_grad=t.requires_grad)
            made[id(t)] = new
        return made[id(t)]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, t in table.items():
                if t is not None:
                    table[name] = replace(t)
    for module in model.modules():
        if isinstance(module, LinearBase):
            module.refresh()
