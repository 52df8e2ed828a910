"""Grass: Adam on some rows of each weight, which are chosen anew now and then (arXiv 2406.17660).

    G_c = P^T G;  m, v <- Adam's moments of G_c;  W <- W - lr scale P update(m, v)

P^T picks r rows of m and multiplies each by rho. A linear layer's backward forms those rows alone
(nn/rows.py), so that between two choices no whole gradient exists.
"""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops, placement
from .. import recipe as recipes
from ..nn import rows as layers
from ..nn.linear import LinearBase
from ..recipe import Recipe
from ..rows import Rows
from ..tensor import ScaledTensor, is_sharded, local
from . import rounding
from .adamw import EMAS, AdamW, _row
from .base import Item
from .moments import MOMENTS, Ema
from .states import scaling
from .subspace import AGE, REFRESHES, UPDATES, Counts

SELECTS = ("top", "sample", "sample-uniform")


@dataclass(frozen=True)
class RowEma:
    """The slot of a moment of r rows [r, n] of a weight [m, n]."""

    ema: Ema
    rank: int
    is_flat = True

    def zeros(self, p: Tensor) -> Tensor:
        """The moment of a parameter before its first step."""
        return self.ema.zeros(p[: self.rank])

    def fits(self, value: object, p: Tensor) -> bool:
        """Whether `value` is such a moment of p."""
        return self.ema.fits(value, p[: self.rank])

    def __str__(self) -> str:
        return f"{self.ema} of {self.rank} rows"


@dataclass(frozen=True)
class Choice:
    """The slot of the chosen rows (int64 [r]), or of their factors (float32 [2, r]): rho, and what
    multiplies the update, which is rho times how often the row was drawn."""

    rank: int
    dtype: torch.dtype
    is_flat = True

    def zeros(self, p: Tensor) -> Tensor:
        """A choice before the first refresh, which the first step makes."""
        r = min(self.rank, p.shape[0])
        shape = (r,) if self.dtype == torch.int64 else (2, r)
        return torch.zeros(shape, dtype=self.dtype, device=p.device)

    def fits(self, value: object, p: Tensor) -> bool:
        """Whether `value` is such a choice for p, with rows that p has."""
        wanted = self.zeros(p[:, :0])
        if not isinstance(value, Tensor) or (value.dtype, value.shape) != (
            wanted.dtype, wanted.shape
        ):  # fmt: skip
            return False
        if self.dtype != torch.int64 or value.is_meta:
            return True
        return bool(((value >= 0) & (value < p.shape[0])).all())

    def __str__(self) -> str:
        return f"{self.dtype} of {self.rank} rows"


def select_rows(norms: Tensor, rank: int, select: str, seed: int = 0, refreshes: int = 0
                ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chooses `rank` of m rows by their norms (float32 [m]).

    "top" takes the largest, with rho = 1. "sample" draws with replacement, by q proportional to the
    norms, "sample-uniform" by q = 1 / m, with rho = 1 / sqrt(rank q): the mean of P P^T is the
    identity. The draws depend on (seed, refreshes) and q alone, and are the same on every device.

    Returns:
        (index int64 [r], rho float32 [r]), r = min(rank, m); the index of "top" ascends.
    """
    m = norms.numel()
    r = min(rank, m)
    if select == "top":
        return norms.topk(r).indices.sort().values, norms.new_ones(r)
    q = norms.double().cpu() if select == "sample" else torch.ones(m, dtype=torch.float64)
    q = q / q.sum() if q.sum() > 0 else torch.full_like(q, 1 / m)
    random = torch.Generator().manual_seed((seed << 32 | refreshes) & (2**63 - 1))
    index = torch.multinomial(q, r, replacement=True, generator=random).sort().values
    rho = (r * q[index]).rsqrt().float()
    return index.to(norms.device), rho.to(norms.device)


class Grass(AdamW):
    """Adam on `rank` rows of the weight [m, n] of each linear layer (arXiv 2406.17660), chosen by
    the norms of the gradient's rows every `every` steps; moments and their bias correction then
    start anew. Rows that are not chosen do not change, not even by weight decay. All other
    parameters (norms, biases, embeddings, what `skip` names) take plain AdamW.

    Given a model, its linear layers (nn.Linear, and converted ones whose weight is plain:
    "tensorwise", "coat") form the chosen rows of their weight's gradient alone, r / m of the
    product. **`.grad` of such a weight is a `Rows`**: to autograd a tensor of the weight's shape,
    of which the rows `.index` exist as `.values`. torch's and this package's clip_grad_norm_,
    accumulation over micro-batches, finite checks, `release_gradients` and `distributed.ddp` (which
    sends the values) take it; any other op raises NotImplementedError. In the steps that choose
    anew, the first and then one in `every`, it is the whole plain gradient, of the mean over ranks
    under ddp: all ranks choose the same rows. Such a step waits for the device once; the others
    do not. `remove()` gives the layers back. A compiled model cannot form rows: torch.compile fails
    on the plain layers, and converted ones form whole gradients there.

    Given parameters or groups there are no layers: each matrix (except in groups with
    `"compress": False`, where embeddings belong) is projected from its whole gradient, which saves
    memory of states only, and a warning says so.

    Args:
        model: an nn.Module, or parameters or groups as torch's optimizers take them.
        lr, betas, eps, weight_decay: as AdamW.
        rank: rows of each weight, >= 1; above m it is m.
        every: steps between two choices, >= 1.
        select: "top", "sample" or "sample-uniform"; see select_rows.
        scale: > 0, multiplies the update of projected weights (the paper's alpha).
        recipe: whose `exp_avg` and `exp_avg_sq` store the moments, and whose `bf16_master` rounds.
        skip: names of linear layers to leave to AdamW: a full name, its last part or a pattern.

    Raises:
        ValueError: options out of range, a recipe with a Subspace or SubsetNorm, an f16 master
            (fp8lm-*), sharded weights, torch's DistributedDataParallel, which would send whole
            gradients, and what AdamW refuses.
        RuntimeError: from `step`, as AdamW, and where a CUDA graph captures a step that chooses.
    """

    name = "Grass"
    takes_rows = True

    def __init__(self, model: nn.Module | Iterable, lr=3e-4, betas=(0.9, 0.999), eps=1e-8,
                 weight_decay=0.0, *, rank: int = 128, every: int = 200, select: str = "top",
                 scale: float = 1.0, recipe: str | Recipe = "bf16",
                 skip: Iterable[str] = ("lm_head",)):  # fmt: skip
        _check(rank, every, select, scale)
        self.rank, self.every, self.select, self.scale = rank, every, select, float(scale)
        # Host copies of `counts`: their version, steps since the choice, choices. Checkpoints are
        # loaded into the states, which changes the version.
        self._due: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._layers: list[nn.Module] | None = None
        self._projected: set[Tensor] = set()
        if isinstance(model, nn.Module):
            self._layers = _linear_layers(model, tuple(skip))
            self._projected = {layer.weight for layer in self._layers}
            params = [p for p in model.parameters() if p.requires_grad]
        else:
            params = model
        super().__init__(params, lr, betas, eps, weight_decay, _checked_recipe(recipe))
        for layer in self._layers or ():
            if type(layer) is nn.Linear:
                layers.enable_rows(layer)
        self._teach()
        if self._layers is None:
            warnings.warn(
                "Grass: given parameters, it projects whole gradients and saves no gradient "
                "memory; give it the model, so that its linear layers form the chosen rows alone",
                stacklevel=2,
            )

    def __getstate__(self) -> dict:
        mine = ("rank", "every", "select", "scale", "_layers", "_projected")
        kept = {k: getattr(self, k) for k in mine}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._due = WeakTensorKeyDictionary()
        self._teach()

    def remove(self) -> None:
        """Gives the layers back: backward forms whole gradients, which `step` projects."""
        for layer in self._layers or ():
            layers.disable_rows(layer)
        self._layers = []

    def describe(self) -> str:
        how = f"rank {self.rank}, every {self.every}, {self.select}"
        return f"Grass ({how}) {super().describe()}"

    # States

    def is_projected(self, p: Tensor) -> bool:
        """Whether Adam sees chosen rows of p only."""
        if self._projected or self._layers is not None:
            return p in self._projected
        return p.dim() == 2 and p.numel() > 0 and not self._whole.get(p, False)

    def slots(self, p: Tensor) -> dict:
        if not self.is_projected(p):
            return super().slots(p)
        rank = min(self.rank, p.shape[0])
        slots = {key: RowEma(MOMENTS[getattr(self.recipe, key)], rank) for key in EMAS}
        slots |= {"rows": Choice(rank, torch.int64), "factors": Choice(rank, torch.float32)}
        return slots | {"counts": Counts()} | self._remainder(p)

    def _check_parameter(self, p: Tensor) -> None:
        if self.is_projected(p):
            if isinstance(local(p), ScaledTensor):
                raise ValueError(
                    "Grass: rows of an f16 master (fp8lm-*) cannot be updated alone; wanted plain "
                    'weights, of "tensorwise", "coat" or a model that is not converted'
                )
            if is_sharded(p) or placement.shard_of(p) is not None:
                raise ValueError(
                    "Grass: rows of a sharded weight are not chosen over ranks; wanted whole "
                    "weights, with quaver.distributed.ddp"
                )
        super()._check_parameter(p)

    def _teach(self) -> None:
        """Lets the layers ask for the rows that the next step takes."""
        for layer in self._layers or ():
            layers.choose_rows(layer.weight, self._wanted_rows)

    def _wanted_rows(self, p: Tensor) -> Tensor | None:
        """The rows of p's gradient that the next step takes; None for all."""
        state = self.state.get(p)
        return None if not state or self._ages(state)[0] % self.every == 0 else state["rows"]

    def _ages(self, state: dict) -> tuple[int, int]:
        counts = state["counts"]
        version, *ages = self._due.get(counts, (None, 0, 0))
        if version != counts._version:
            age, _, refreshes = counts.tolist()
            ages = (age, refreshes)
            self._due[counts] = (counts._version, *ages)
        return tuple(ages)

    # The step

    def update(self, device: torch.device, items: list[Item], amaxes: Tensor) -> None:
        order = sorted(range(len(items)), key=lambda i: self.is_projected(items[i].parameter))
        items = [items[i] for i in order]
        table = self._hyper.on(
            device, [item.parameter for item in items], [_row(item.group) for item in items]
        )
        plain = sum(not self.is_projected(item.parameter) for item in items)
        usable = amaxes.isfinite().all()
        if plain:
            amaxes = torch.stack([amaxes[i] for i in order[:plain]])
            amaxes = torch.where(usable, amaxes, torch.inf)
            self._update_fused(items[:plain], amaxes, table[:plain], self._skipped[device])
        else:
            self._skipped[device] += ~usable
        for item, row in zip(items[plain:], table[plain:], strict=True):
            ages = self._refresh(item, usable)
            self._step_rows(item, usable, row)
            counts = item.state["counts"]  # whose version the step has changed
            self._due[counts] = (counts._version, *ages)

    def _refresh(self, item: Item, usable: Tensor) -> tuple[int, int]:
        """Chooses rows by a whole gradient, where that is due and the step is not skipped. Returns
        the steps since the choice, this one included, and the choices."""
        p, state, grad = item.parameter, item.state, item.grad
        age, refreshes = self._ages(state)
        if isinstance(grad, Rows) and (grad.index is not state["rows"] or age % self.every == 0):
            raise RuntimeError(
                "Grass: a gradient has rows that this optimizer did not choose; wanted one Grass "
                "for a model (remove() the other), and backward before the next step()"
            )
        if age % self.every:
            age += 1
        else:
            if p.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "Grass: a step that chooses rows cannot be captured, because the host decides "
                    "whether it is skipped"
                )
            if not bool(usable):
                return age, refreshes
            norms = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float32)
            index, rho = select_rows(norms, self.rank, self.select, item.ordinal, refreshes)
            places = rho.new_zeros(p.shape[0])
            places.index_add_(0, index, torch.ones_like(rho))
            state["rows"] = index  # a new tensor: gradients of older graphs keep theirs
            state["factors"].copy_(torch.stack([rho, rho * places[index]]))
            for key in EMAS:
                state[key] = self.slots(p)[key].zeros(p)
            state["counts"][UPDATES] = 0
            age, refreshes = 1, refreshes + 1
        # Filled, because a copy from the host would wait for the device.
        state["counts"][AGE].fill_(age)
        state["counts"][REFRESHES].fill_(refreshes)
        return age, refreshes

    def _step_rows(self, item: Item, usable: Tensor, row: Tensor) -> None:
        p, state, grad = item.parameter, item.state, item.grad
        index, (rho, factor) = state["rows"], state["factors"]
        values = grad.values if isinstance(grad, Rows) else grad.index_select(0, index)
        if self.select != "top":
            values = values.float() * rho[:, None]
        update = self._adam(item, values, usable, row)
        decay = (1 - row[0] * row[4]).float()
        how, kept = self._rounding(p), p.index_select(0, index)
        remainder = state.get("remainder")
        low = None if remainder is None else remainder.index_select(0, index)
        old = rounding.master(kept, low)
        new = torch.where(usable, decay * old + update * (self.scale * factor)[:, None], old)
        if self.select != "top":  # all places of a row write what its first place has
            first = torch.searchsorted(index, index)
            new = new.index_select(0, first)
        rounding.store_(kept, new, how, low, item.ordinal, state["step"])
        if self.select != "top":
            kept = kept.index_select(0, first)
            low = None if low is None else low.index_select(0, first)
        p.index_copy_(0, index, kept)
        if low is not None:
            remainder.index_copy_(0, index, low)
        state["step"] += usable

    def _adam(self, item: Item, values: Tensor, usable: Tensor, row: Tensor) -> Tensor:
        """-lr times Adam's update of the rows, float32 [r, n]: what the fused step makes of zero
        weights without decay."""
        state = item.state
        update = torch.zeros(values.shape, dtype=torch.float32, device=values.device)
        hyper = row.clone()
        hyper[4].zero_()
        moments = [state[key] for key in EMAS]
        ops.adam_(
            [update],
            moments[:1],
            moments[1:],
            [values.contiguous()],
            grad_amax=torch.where(usable, 0.0, torch.inf).float().reshape(1),
            steps=[state["counts"][UPDATES]],
            hyper=hyper[None],
            skipped=torch.zeros_like(state["step"]),
            scalings=[scaling(t) for t in (update, *moments)],
        )
        return update


def _checked_recipe(recipe: str | Recipe) -> Recipe:
    found = recipes.get(recipe)
    if found.composed or found.packed:
        raise ValueError(
            f"Grass: recipe {found.name} has a moment in 4 bits, or one that is not a value for "
            'each element; wanted one of averages, such as "bf16"'
        )
    return found


def _check(rank, every, select, scale) -> None:
    for name, value in (("rank", rank), ("every", every)):
        if type(value) is not int or not 1 <= value < 2**31:
            raise ValueError(f"Grass: {name} must be an int from 1 to 2^31 - 1, got {value!r}")
    if select not in SELECTS:
        raise ValueError(f"Grass: select must be one of {', '.join(SELECTS)}, got {select!r}")
    if not 0 < scale < math.inf:
        raise ValueError(f"Grass: scale must be > 0 and finite, got {scale}")


def _linear_layers(model: nn.Module, skip: tuple[str, ...]) -> list[nn.Module]:
    """The linear layers whose weights no module of another kind uses."""
    others, found = set(), []
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "Grass: torch's DistributedDataParallel sends whole gradients; give the model "
                "inside it, and use quaver.distributed.ddp"
            )
        named = any(fnmatch.fnmatchcase(name, s) or name.rpartition(".")[2] == s for s in skip)
        linear = isinstance(module, LinearBase) or type(module) in (nn.Linear, layers.of(nn.Linear))
        if linear and not named and isinstance(module._parameters.get("weight"), nn.Parameter):
            found.append(module)
        else:
            others |= set(module.parameters(recurse=False))
    return [m for m in found if m.weight.requires_grad and m.weight not in others]
