"""The settings by which a model fits a card, found by plans of one after another."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import UsageError
from .plan import Plan, plan

__all__ = ["tries"]

RECIPES = ("bf16", "coat")
OPTIMIZERS = (None, "adamw-4bit", "adamw-4bit-factor")


def tries(
    model,
    size: int,
    recipe: str | None = None,
    optimizer: str | None = None,
    *,
    release: bool = False,
    recompute: bool = False,
    **options,
) -> Iterator[Plan]:
    """Plans of `model` until one whose peak is at most `size` bytes, which is the last; none of
    them fits where there is no such setting. They go from settings that cost least to those that
    take least memory, and have what is given here in each: recomputation costs time, 4-bit moments
    some quality, a release the clipping by the norm of the whole gradient. `options` as of plan.
    Raises UsageError as plan does."""
    kept: dict[tuple, int] = {}  # {settings: bytes that no other flag frees}
    for chosen, moments, released, again in _ladder(recipe, optimizer, release, recompute):
        if kept.get((chosen, moments), 0) > size:
            continue
        try:
            found = plan(model, chosen, moments, release=released, recompute=again, **options)
        except UsageError:
            if not kept:  # no setting is to blame
                raise
            kept[chosen, moments] = size + 1  # the optimizer does not take this recipe
            continue
        yield found
        if found["peak"] <= size:
            return
        by_kind = found["peak_by_kind"]
        kept[chosen, moments] = by_kind["weights"] + by_kind["states"]


def _ladder(
    recipe: str | None, optimizer: str | None, release: bool, recompute: bool
) -> Iterator[tuple[str, str | None, bool, bool]]:
    """Settings (recipe, optimizer, release, recompute) in the order in which they are tried."""
    for moments in (optimizer,) if optimizer is not None else OPTIMIZERS:
        for released in (release,) if release else (False, True):
            for again in (recompute,) if recompute else (False, True):
                for chosen in (recipe,) if recipe is not None else RECIPES:
                    yield chosen, moments, released, again
