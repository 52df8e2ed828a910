"""The output of a run: a bar on a terminal, plain lines elsewhere, and the closing table."""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
import time
from collections.abc import Iterable

from .errors import UsageError

__all__ = ["MIB", "Progress", "baseline", "check_installed", "grid", "number", "samples",
           "table"]  # fmt: skip

SECONDS_PER_LINE = 10


def number(value: float | None, digits: int = 4) -> str:
    return "nan" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def check_installed(command: str) -> None:
    """Raises UsageError where a package of the extra `train` is missing that a run needs."""
    missing = [p for p in ("matplotlib", "tqdm") if importlib.util.find_spec(p) is None]
    if missing:
        raise UsageError(f"{command} needs {' and '.join(missing)}: pip install quaver[train]")


class Progress:
    """Shows steps `start`+1..`steps` of one recipe. On a terminal a tqdm bar; otherwise a line for
    the first and last step, those with a held-out loss, and every ten seconds between. One that is
    not `shown` prints none."""

    def __init__(self, name: str, start: int, steps: int, shown: bool = True):
        self.name, self.start, self.steps, self.quiet = name, start, steps, not shown
        self.began = self.shown = time.monotonic()
        self.bar, self.held_out = None, ""
        if shown and sys.stdout.isatty():
            from tqdm import tqdm

            # The size is passed on, since tqdm shows nothing on a terminal that reports none.
            size = shutil.get_terminal_size()
            self.bar = tqdm(
                desc=name,
                total=steps,
                initial=start,
                file=sys.stdout,
                unit="step",
                ncols=size.columns - 1,
                nrows=size.lines,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        if self.bar:
            self.bar.close()

    def say(self, text: str) -> None:
        if self.quiet:
            return
        if self.bar:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def step(self, step: int, line: dict) -> None:
        if self.quiet:
            return
        trouble = f"  skipped {line['skipped']}" if line["skipped"] else ""
        loss, speed = number(line["loss"]), f"{line['tokens_per_s']:,.0f}"
        if "val_loss" in line:
            self.held_out = f"held-out {number(line['val_loss'])}  "
        if self.bar:
            # A terminal has room for one loss: the held-out one, as soon as there is one.
            text = f"{self.held_out or f'loss {loss}  '}{speed} tokens/s{trouble}"
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
            return
        now = time.monotonic()
        first_or_last = step in (self.start + 1, self.steps) or "val_loss" in line
        if first_or_last or now - self.shown >= SECONDS_PER_LINE:
            self.shown = now
            left = (now - self.began) / (step - self.start) * (self.steps - step)
            print(
                f"{self.name}  step {step}/{self.steps}  {self.held_out}loss {loss}"
                f"  {speed} tokens/s  {_duration(left)} left{trouble}",
                flush=True,
            )


MIB = 2**20
CUT = 240  # characters of a sample
LEGEND = """\
held-out: loss of text that was not trained on. Another --seed moves a change by
most of a percent in short runs: try two before you trust one. train: mean loss
of the last 5 % of the steps, which is noisier. B/param: master, gradient and
moments of a linear weight; +copies: with its cached FP8 copies. saved MiB:
activations kept for backward by all layers, and by the linear ones. total MiB:
parameters, gradients, states and saved activations; x less: the baseline's
bytes divided by these."""
STATES = """
states: the optimizer's part of B/param."""


def _row(name: str, result: dict, base: dict) -> dict[str, str]:
    memory = result["memory"]
    per = memory["bytes_per_param"]
    loss, base_loss = result["val_loss"], base["val_loss"]
    known = result is not base and None not in (loss, base_loss)
    return {
        "recipe": name,
        "held-out": number(loss),
        "change": f"{(loss / base_loss - 1) * 100:+.2f} %" if known else "-",
        "train": number(result["final_loss"]),
        "tokens/s": f"{result['tokens_per_s']:,.0f}",
        "x": f"{result['tokens_per_s'] / base['tokens_per_s']:.2f}",
        "B/param": f"{per['state']:.2f}" if per else "-",
        "states": f"{per['exp_avg'] + per['exp_avg_sq']:.2f}" if per else "-",
        "+copies": f"{per['all']:.2f}" if per else "-",
        "saved MiB": f"{memory['activation'] / MIB:.1f}",
        "linear": f"{memory['activation_linear'] / MIB:.1f}",
        "total MiB": f"{memory['total'] / MIB:.1f}",
        "x less": f"{base['memory']['total'] / memory['total']:.2f}",
        "skipped": str(result["skipped"]),
    }


def baseline(names: Iterable[str]) -> str:
    """The training that others are compared with: bf16 where it is one, with AdamW where
    optimizers were chosen, otherwise the first."""
    names = list(names)
    return next((name for name in ("bf16", "bf16+adamw") if name in names), names[0])


def table(results: dict[str, dict]) -> str:
    """The results of several trainings ({name: result}) as lines of text."""
    base = baseline(results)
    rows = [_row(name, result, results[base]) for name, result in results.items()]
    head = {key: key for key in rows[0]} | {"change": f"vs {base}"}
    if not any(result["skipped"] for result in results.values()):
        del head["skipped"]
    chosen = any("+" in name for name in results)  # by --optimizer
    if not chosen:
        del head["states"]
    return f"{grid(head, rows)}\n\n{LEGEND + STATES * chosen}"


def grid(head: dict[str, str], rows: list[dict[str, str]]) -> str:
    """Rows of cells as aligned lines under their titles: the columns of `head`, {key: title}."""
    widths = {key: max(len(row[key]) for row in (head, *rows)) for key in head}
    lines = []
    for row in (head, *rows):
        first, *others = ((row[key], width) for key, width in widths.items())
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  ".join(cells))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def samples(results: dict[str, dict]) -> str:
    """What each training's model makes of one held-out text, as lines."""
    first = next(iter(results.values()))["sample"]
    lines = [("prompt", first["prompt"]), ("wanted", first["wanted"])]
    lines += [(name, result["sample"]["answer"]) for name, result in results.items()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {_short(text)}" for name, text in lines)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= CUT else f"{text[:CUT]}..."
