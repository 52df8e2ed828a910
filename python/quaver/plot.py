"""The loss curves and the memory of a run as pictures."""

from __future__ import annotations

import math
from pathlib import Path

from .files import replacing
from .memory import ACTIVATION_KINDS, KINDS, activation_by_kind

__all__ = ["new_figure", "plot_losses", "plot_memory"]

MIB = 2**20


def smooth(values: list[float | None], window: int) -> list[float]:
    """Trailing mean over `window` values; a value that is None is left out of it."""
    result = []
    for i in range(len(values)):
        seen = [v for v in values[max(0, i - window + 1) : i + 1] if v is not None]
        result.append(sum(seen) / len(seen) if seen else math.nan)
    return result


def new_figure(height: float):
    """A figure 8 inches wide, for PNG."""
    # Imported and drawn without pyplot: no global state, no display, and a fast `import quaver`.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def memory_kinds(memory: dict) -> dict[str, int]:
    """{kind: bytes} of a memory report, the activations split by kind; they add up to its total."""
    activations = activation_by_kind(memory["activation_by_layer"])
    return {kind: memory[kind] for kind in (*KINDS, "other")} | {
        f"saved: {kind}": activations[kind] for kind in ACTIVATION_KINDS
    }


def plot_memory(path: Path, memories: dict[str, dict], title: str, base: str) -> None:
    """Draws {recipe: memory report} to a PNG file: a bar for each, its bytes stacked by kind, and
    the bytes of the recipe `base` divided by these."""
    figure = new_figure(1.5 + 0.6 * len(memories))
    axes = figure.subplots()
    stacks = {name: memory_kinds(memory) for name, memory in memories.items()}
    names = list(stacks)
    kinds = [kind for kind in stacks[names[0]] if any(s[kind] for s in stacks.values())]
    colors = {kind: f"C{i}" for i, kind in enumerate((*KINDS, "other"))}
    left = dict.fromkeys(names, 0.0)
    for kind in kinds:
        shade = [k for k in kinds if k not in colors]
        gray = None if kind in colors else str(0.35 + 0.5 * shade.index(kind) / len(shade))
        widths = [stacks[name][kind] / MIB for name in names]
        color = colors.get(kind, gray)
        axes.barh(names, widths, left=list(left.values()), color=color, label=kind, height=0.6)
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    for row, (name, total) in enumerate(left.items()):
        text = f" {total:,.0f}"
        if name != base:
            text += f" ({left[base] / total:.2f} x less)"
        axes.text(total, row, text, va="center", fontsize=8)
    axes.set_xlim(0, max(left.values()) * 1.2)
    axes.invert_yaxis()
    axes.set_xlabel("MiB")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def plot_losses(path: Path, curves: dict[str, list[dict]], title: str, base: str) -> None:
    """Draws {recipe: its metrics} to a PNG file: the held-out losses bold, with the last one in the
    legend, and the training losses behind them, each step faint and their trailing mean (a loss
    that was not finite is None). Below, the difference of each held-out loss to the recipe
    `base`'s."""
    held_out = {
        name: {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
        for name, lines in curves.items()
    }
    figure = new_figure(6 if len(curves) > 1 else 4.5)
    heights = [3, 1] if len(curves) > 1 else [1]
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    window = max(1, max(map(len, curves.values())) // 30)
    _draw_losses(axes[0][0], curves, held_out, window)
    axes[0][0].set_title(title, fontsize=10)
    if len(curves) > 1:
        _draw_changes(axes[1][0], held_out, base)
    axes[-1][0].set_xlabel(f"step (thin: training, mean of {window})")
    for row in axes:
        row[0].grid(alpha=0.25)
        row[0].spines[["top", "right"]].set_visible(False)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _draw_losses(axes, curves: dict[str, list[dict]], held_out: dict, window: int) -> None:
    for i, (name, lines) in enumerate(curves.items()):
        color, steps = f"C{i}", [line["step"] for line in lines]
        values = [line["loss"] for line in lines]
        raw = [math.nan if value is None else value for value in values]
        axes.plot(steps, raw, color=color, alpha=0.15, linewidth=0.8)
        axes.plot(steps, smooth(values, window), color=color, alpha=0.6, linewidth=0.8)
        # Curves that agree lie on each other: dashes let the one below show.
        style = "-" if i == 0 else (0, (4, 2))
        found = [math.nan if value is None else value for value in held_out[name].values()]
        label = f"{name}: held-out {found[-1]:.4f}"
        at = list(held_out[name])
        axes.plot(at, found, color=color, marker="o", markersize=4, linestyle=style, label=label)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)


def _draw_changes(axes, held_out: dict[str, dict], base: str) -> None:
    wanted = held_out[base]
    for i, found in enumerate(held_out.values()):
        pairs = {step: (loss, wanted.get(step)) for step, loss in found.items()}
        known = {step: pair for step, pair in pairs.items() if None not in pair}
        percent = [(loss / other - 1) * 100 for loss, other in known.values()]
        axes.plot(list(known), percent, color=f"C{i}", marker="o", markersize=4)
    axes.set_ylabel(f"held-out,\n% to {base}")
