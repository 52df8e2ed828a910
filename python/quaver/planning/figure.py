"""Plans as a picture: a bar for each, its peak stacked by kind, against the card's memory."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from ..files import replacing
from ..plot import new_figure
from .ledger import PEAK_KINDS
from .plan import Plan

__all__ = ["plot_plans"]

GB = 10**9


def plot_plans(path: Path, plans: dict[str, Plan], title: str, size: int | None) -> None:
    """Draws {label: plan} to a PNG file, with a line at `size` bytes. Raises UsageError without
    matplotlib."""
    try:
        figure = new_figure(1.8 + 0.5 * len(plans))
    except ImportError:
        raise UsageError("plan: --plot needs matplotlib: pip install quaver[train]") from None
    axes = figure.subplots()
    left = dict.fromkeys(plans, 0.0)
    for i, kind in enumerate(PEAK_KINDS):
        widths = [plan["peak_by_kind"][kind] / GB for plan in plans.values()]
        axes.barh(list(plans), widths, left=list(left.values()), label=kind, color=f"C{i}")
        left = {name: left[name] + width for name, width in zip(left, widths, strict=True)}
    for row, total in enumerate(left.values()):
        axes.text(total, row, f" {total:,.3g}", va="center", fontsize=8)
    most = max(left.values())
    if size is not None:
        axes.axvline(size / GB, color="black", linestyle="--", label=f"{size / GB:g} GB")
        most = max(most, size / GB)
    axes.set_xlim(0, most * 1.12)
    axes.invert_yaxis()
    axes.set_xlabel("GB at the peak of a step")
    axes.set_title(title, fontsize=10)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=7, frameon=False, fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png")
