"""The loss curves of a run as a picture."""

from quaver.files import replacing

__all__ = ["plot_losses"]


def smooth(values, window):
    """Trailing mean over `window` values; a value that is None is left out of it."""
    result = []
    for i in range(len(values)):
        seen = [v for v in values[max(0, i - window + 1) : i + 1] if v is not None]
        result.append(sum(seen) / len(seen) if seen else float("nan"))
    return result


def plot_losses(path, losses, title, base):
    """Draws {recipe: [loss of step 1, 2, ..]} (None where it was not finite) to a PNG file: the raw
    curves faint, their trailing means bold, and below the difference of each to the first
    recipe."""
    # Imported and drawn without pyplot: no global state, no display, and a fast `import quaver`.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    several = len(losses) > 1
    figure = Figure(figsize=(8, 6 if several else 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    heights = [3, 1] if several else [1]
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    top = axes[0][0]
    window = max(1, max(map(len, losses.values())) // 30)
    means = {name: smooth(values, window) for name, values in losses.items()}
    for i, (name, values) in enumerate(losses.items()):
        steps = range(1, len(values) + 1)
        raw = [float("nan") if value is None else value for value in values]
        top.plot(steps, raw, color=f"C{i}", alpha=0.2, linewidth=0.8)
        # Curves that agree lie on each other: dashes let the one below show.
        style = "-" if i == 0 else (0, (4, 2))
        top.plot(steps, means[name], color=f"C{i}", linestyle=style, label=name)
    top.set_ylabel("training loss (nats per token)")
    top.set_title(title, fontsize=10)
    top.legend(frameon=False)
    if several:
        bottom = axes[1][0]
        for i, values in enumerate(means.values()):
            percent = [(a / b - 1) * 100 for a, b in zip(values, means[base], strict=False)]
            bottom.plot(range(1, len(percent) + 1), percent, color=f"C{i}")
        bottom.set_ylabel(f"% to {base}")
    bold = f" (bold: mean of {window})" if window > 1 else ""
    axes[-1][0].set_xlabel(f"step{bold}")
    for row in axes:
        row[0].grid(alpha=0.25)
        row[0].spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
