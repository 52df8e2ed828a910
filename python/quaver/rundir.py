"""The folder of a training run: its configuration, metrics, checkpoints and summary.

    OUT/config.json  OUT/summary.json  OUT/loss.png  OUT/memory.png
    OUT/RECIPE/metrics.jsonl  OUT/RECIPE/checkpoint/state.safetensors  OUT/RECIPE/tensorboard/

Under tensor parallelism each part of a model has its state: state-tp0of2.safetensors, and so on.

Only files of these names are ever removed. OUT/.lock keeps two processes from writing one run.
"""

import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from quaver.errors import UsageError
from quaver.files import write_text

__all__ = ["Metrics", "RunDir"]


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from None


def _differences(old, new, prefix=""):
    """ "key old (now new)" for every leaf in which two nested dicts differ."""
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} {json.dumps(a)} (now {json.dumps(b)})"


class RunDir:
    """The folder `out`. Raises UsageError for a folder that must not be written to."""

    def __init__(self, out):
        self.path = Path(out)
        self.config_path = self.path / "config.json"
        self.summary_path = self.path / "summary.json"
        self.plot_path = self.path / "loss.png"
        self.memory_plot_path = self.path / "memory.png"

    def metrics_path(self, recipe):
        return self.path / recipe / "metrics.jsonl"

    def checkpoint_path(self, recipe, part=None, parts=None):
        name = "state" if part is None else f"state-tp{part}of{parts}"
        return self.path / recipe / "checkpoint" / f"{name}.safetensors"

    def tensorboard_path(self, recipe):
        return self.path / recipe / "tensorboard"

    def check(self, config, resume=False, overwrite=False):
        """Refuses to start a run of `config` here where that would lose or mix up results.

        `data` may differ on resumption: it names where the text lies, its fingerprint what it is.
        """
        out = self.path
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is not a folder")
        if self.config_path.exists():
            if resume:
                old = _read_json(self.config_path)
                found = list(_differences({**old, "data": None}, {**config, "data": None}))
                if found:
                    raise UsageError(f"--resume: {out} was started with {', '.join(found)}")
            elif not overwrite:
                raise UsageError(
                    f"{out} holds a run already: --resume continues it, --overwrite replaces it"
                )
        elif out.is_dir() and any(not name.startswith(".") for name in os.listdir(out)):
            raise UsageError(f"{out} holds other files and no run: choose another --out")

    @contextmanager
    def started(self, config, resume=False):
        """Makes the folder ready and keeps other processes out of it until the block ends. Without
        `resume` an earlier run's files go."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {self.path}: {error.strerror}") from None
        with open(self.path / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed process loses it
            except BlockingIOError:
                raise UsageError(f"{self.path} is in use by another process") from None
            if self.config_path.exists() and not resume:
                self._remove(_read_json(self.config_path)["recipes"])
            if not self.config_path.exists():
                write_text(self.config_path, json.dumps(config, indent=2) + "\n")
            yield

    def _remove(self, recipes):
        for name in recipes:
            self.metrics_path(name).unlink(missing_ok=True)
            for path in self.checkpoint_path(name).parent.glob("state*.safetensors"):
                path.unlink()
            if self.tensorboard_path(name).is_dir():
                shutil.rmtree(self.tensorboard_path(name))
        self.summary_path.unlink(missing_ok=True)
        self.plot_path.unlink(missing_ok=True)
        self.memory_plot_path.unlink(missing_ok=True)
        # Last, so that a removal that was cut short can be repeated.
        self.config_path.unlink()

    def results(self):
        """{recipe: result} of the recipes that are done."""
        return _read_json(self.summary_path)["recipes"] if self.summary_path.exists() else {}

    def write_summary(self, summary):
        write_text(self.summary_path, json.dumps(summary, indent=2) + "\n")


class Metrics:
    """One JSON line a step, flushed as it is written; NaN and Inf are written as null.

    Opened at `step` it keeps exactly the lines 1..step that an earlier process wrote: what came
    after the checkpoint is trained, and written, again. Raises UsageError if some of them are
    missing. One that does not write leaves the file alone: of several ranks, the first writes.
    """

    def __init__(self, path, step=0, writes=True):
        self.lines = _complete_lines(path)[:step]
        if [line.get("step") for line in self.lines] != list(range(1, step + 1)):
            raise UsageError(f"{path} lacks steps before the checkpoint's step {step}")
        self.file = None
        if not writes:
            return
        write_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.file is not None:
            self.file.close()

    def write(self, line):
        self.lines.append(line)
        if self.file is None:
            return
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()

    def sync(self):
        """Makes the lines durable: before a checkpoint that counts on them."""
        if self.file is not None:
            os.fsync(self.file.fileno())


def _complete_lines(path):
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break  # a killed process may have written half a line; what follows is trained again
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines
