"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, and the closing
table."""

import math
import sys
import time

from tqdm import tqdm

__all__ = ["Progress", "baseline", "table"]

SECONDS_PER_LINE = 10


def _number(value, digits=4):
    return "nan" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


class Progress:
    """Shows steps `start`+1..`steps` of one recipe. On a terminal a tqdm bar; otherwise a line for
    the first and last step and every ten seconds between."""

    def __init__(self, name, start, steps):
        self.name, self.start, self.steps = name, start, steps
        self.began = self.shown = time.monotonic()
        self.bar = None
        if sys.stdout.isatty():
            self.bar = tqdm(
                desc=name, total=steps, initial=start, file=sys.stdout, unit="step",
                dynamic_ncols=True,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar:
            self.bar.close()

    def say(self, text):
        if self.bar:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def step(self, step, line):
        trouble = f"  skipped {line['skipped']}" if line["skipped"] else ""
        loss, speed = _number(line["loss"]), f"{line['tokens_per_s']:,.0f}"
        if self.bar:
            self.bar.set_postfix_str(f"loss {loss}  {speed} tokens/s{trouble}", refresh=False)
            self.bar.update()
            return
        now = time.monotonic()
        if step in (self.start + 1, self.steps) or now - self.shown >= SECONDS_PER_LINE:
            self.shown = now
            left = (now - self.began) / (step - self.start) * (self.steps - step)
            print(
                f"{self.name}  step {step}/{self.steps}  loss {loss}  {speed} tokens/s"
                f"  {_duration(left)} left{trouble}",
                flush=True,
            )


def _bytes(size):
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _row(name, result, base):
    memory = result["memory"]
    per = memory["bytes_per_param"]
    loss, base_loss = result["final_loss"], base["final_loss"]
    change = (
        "-"
        if result is base or None in (loss, base_loss)
        else f"{(loss / base_loss - 1) * 100:+.2f} %"
    )
    return [
        name,
        _number(loss),
        change,
        _number(result["val_loss"]),
        f"{result['tokens_per_s']:,.0f}",
        f"{result['tokens_per_s'] / base['tokens_per_s']:.2f}",
        f"{per['state']:.2f}" if per else "-",
        f"{per['all']:.2f}" if per else "-",
        _bytes(memory["activation_linear"]),
        _bytes(memory["activation"]),
        str(result["skipped"]),
    ]


def baseline(names):
    """The recipe that others are compared with: bf16 where it was trained, otherwise the first."""
    return "bf16" if "bf16" in names else next(iter(names))


def table(results):
    """The results of several recipes ({name: result}) as lines of text."""
    base = baseline(results)
    head = [
        "recipe", "loss", f"vs {base}", "val loss", "tokens/s", "x", "bytes/param", "with copies",
        "saved: linear", "saved: all", "skipped",
    ]  # fmt: skip
    rows = [head, *(_row(name, result, results[base]) for name, result in results.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
