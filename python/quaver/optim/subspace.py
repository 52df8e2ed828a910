"""Subspace-Momentum: a first moment of the projected gradient, and no momentum beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import recipe
from .subset import matrix_shape

AGE, UPDATES, REFRESHES = range(3)  # of the counts: see Counts


@dataclass(frozen=True)
class Momentum:
    """The slot of the projected moment: [rank, C] for a matrix [R, C] with R <= C, else
    [R, rank]."""

    rule: recipe.Subspace
    is_flat = True

    def shape(self, p: Tensor) -> tuple[int, int]:
        rows, cols = matrix_shape(p)
        rank = min(self.rule.rank, rows, cols)
        return (rank, cols) if rows <= cols else (rows, rank)

    def zeros(self, p: Tensor) -> Tensor:
        """The moment of a parameter before its first step."""
        return torch.zeros(self.shape(p), dtype=self.rule.dtype, device=p.device)

    def fits(self, value: object, p: Tensor) -> bool:
        """Whether `value` is such a moment of p."""
        return _is(value, self.rule.dtype, self.shape(p))

    def __str__(self) -> str:
        return f"a projected moment of rank {self.rule.rank} in {_name(self.rule.dtype)}"


@dataclass(frozen=True)
class Basis:
    """The slot of the projection: orthonormal columns [d, rank] of the smaller axis d, or the
    indices [rank] of the rows or columns that "topk" keeps."""

    rule: recipe.Subspace
    is_flat = True

    def _kind(self, p: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
        d = min(matrix_shape(p))
        rank = min(self.rule.rank, d)
        return (torch.int64, (rank,)) if self.rule.projector == "topk" else (
            self.rule.dtype, (d, rank)
        )  # fmt: skip

    def zeros(self, p: Tensor) -> Tensor:
        """A projection before the first refresh, which the first step makes."""
        dtype, shape = self._kind(p)
        return torch.zeros(shape, dtype=dtype, device=p.device)

    def fits(self, value: object, p: Tensor) -> bool:
        """Whether `value` is a projection of p's shape."""
        return _is(value, *self._kind(p))

    def __str__(self) -> str:
        return f"a basis of rank {self.rule.rank} by {self.rule.projector}"


@dataclass(frozen=True)
class Counts:
    """The slot of three counts, int64 [3]: steps since the refresh, skipped ones included; steps
    that went into the moment; refreshes."""

    is_flat = False

    def zeros(self, p: Tensor) -> Tensor:
        """The counts before the first step."""
        return torch.zeros(3, dtype=torch.int64, device=p.device)

    def fits(self, value: object, p: Tensor) -> bool:
        """Whether `value` are such counts."""
        return _is(value, torch.int64, (3,))

    def __str__(self) -> str:
        return "int64 counts"


def slots(rule: recipe.Subspace) -> dict:
    """The slots of a Subspace, by their keys in the state."""
    return {"exp_avg": Momentum(rule), "basis": Basis(rule), "counts": Counts()}


def refresh_(rule: recipe.Subspace, state: dict, grad: Tensor, seed: int, refreshes: int) -> None:
    """Chooses the subspace of a matrix's gradient (float32 [R, C]) anew, and its moment."""
    left = grad.shape[0] <= grad.shape[1]
    new = _choose(rule, grad if left else grad.t(), seed, refreshes)
    moment = state["exp_avg"]
    if rule.refresh == "carry" and refreshes > 0:
        whole = lift(state["basis"], moment.float(), grad.shape)
        moment.copy_(project(new, whole))
    else:
        moment.zero_()
        state["counts"][UPDATES] = 0
    state["basis"].copy_(new)


def project(basis: Tensor, x: Tensor) -> Tensor:
    """x (float32 [R, C]) in the subspace: [rank, C] where R <= C, else [R, rank]."""
    left = x.shape[0] <= x.shape[1]
    if basis.dtype == torch.int64:
        return x[basis] if left else x[:, basis]
    return basis.float().t() @ x if left else x @ basis.float()


def lift(basis: Tensor, x: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix of `shape` that lies in the subspace and whose projection is x."""
    left = shape[0] <= shape[1]
    if basis.dtype == torch.int64:
        return x.new_zeros(shape).index_copy_(0 if left else 1, basis, x)
    return basis.float() @ x if left else x @ basis.float().t()


def _choose(rule: recipe.Subspace, grad: Tensor, seed: int, refreshes: int) -> Tensor:
    """The basis for grad [d, C], d <= C."""
    d = grad.shape[0]
    rank = min(rule.rank, d)
    if rule.projector == "topk":
        return grad.square().sum(1).topk(rank).indices.sort().values
    if rule.projector == "svd":
        scaled = grad / grad.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        return torch.linalg.eigh(scaled @ scaled.t()).eigenvectors[:, -rank:].flip(1)
    # On the host: the same draws on every device.
    random = torch.Generator().manual_seed((seed << 32 | refreshes) & (2**63 - 1))
    if rule.projector == "random":
        found = torch.linalg.qr(torch.randn(d, rank, generator=random, dtype=torch.float32)).Q
    else:
        signs = torch.randint(0, 2, (d, 1), generator=random).float() * 2 - 1
        kept = torch.randperm(d, generator=random)[:rank]
        found = signs * _transform(d, kept)
    return found.to(grad.device)


def _transform(d: int, kept: Tensor) -> Tensor:
    """The columns `kept` of an orthonormal transform of size d: Hadamard's where d is a power of
    two, else the cosine transform (DCT-II), which exists for every d."""
    i = torch.arange(d)[:, None]
    if d & (d - 1) == 0:
        parity = i & kept
        for shift in (16, 8, 4, 2, 1):
            parity = parity ^ (parity >> shift)
        return (1 - 2 * (parity & 1)).float() / math.sqrt(d)
    angle = math.pi / d * (i.double() + 0.5) * kept
    scale = torch.full(kept.shape, math.sqrt(2 / d), dtype=torch.float64)
    scale.masked_fill_(kept == 0, math.sqrt(1 / d))
    return (angle.cos() * scale).float()


def _is(value: object, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and (value.dtype, value.shape) == (dtype, torch.Size(shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
