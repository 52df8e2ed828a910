"""The folder of a training run: its configuration, metrics, checkpoints and summary.

    OUT/config.json  OUT/summary.json  OUT/loss.png  OUT/memory.png
    OUT/base/: the tokenizer, and the config of the folder that a run started from
    OUT/NAME/metrics.jsonl  OUT/NAME/checkpoint/state.safetensors  OUT/NAME/tensorboard/

NAME is RECIPE, or RECIPE+OPTIMIZER where --optimizer names one; of `quaver tune` it is a method,
and OUT/NAME/tuned/ holds the result.

Under tensor parallelism each part of a model has its state: state-tp0of2.safetensors, and so on.

Only files of these names are ever removed, and no link in the folder is followed. OUT/.lock keeps
two processes from writing one run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import optimizers
from .errors import FileError, UsageError
from .files import expanded, locked, new_folder, read_text, remove_known, write_text
from .schema import Each, Maybe, SchemaError, check, parse, with_crc32, without_crc32

__all__ = ["RESULT", "Kind", "RunDir", "changes"]

CONFIG = {"data_sha256": str, "model": dict, "seed": int}
MEMORY = {"bytes_per_param": Each(float), "activation": int, "activation_linear": int,
          "activation_by_layer": Each(Each(int)), "total": int}  # fmt: skip
RESULT = {
    "final_loss": Maybe(float),
    "val_loss": Maybe(float),
    "sample": {"prompt": str, "wanted": str, "answer": str},
    "tokens_per_s": float,
    "memory": MEMORY,
    "steps": int,
    "skipped": int,
    "metrics_crc32": int,
}
SUMMARY = {"machine": dict, "config": dict}

BASE = {r"[\w.-]+\.(json|jinja|txt|model)": None}  # the contents of base/
# The contents of a training's folder, by regular expressions: folders as dicts, files as None.
OURS = {
    r"metrics\.jsonl": None,
    "checkpoint": {
        r"state(-tp\d+of\d+(\.next)?)?\.safetensors": {
            r"checkpoint\.json": None,
            r"\.lock": None,
            "[ab]": {r"shard-\d+-model-\d+-of-\d+\.safetensors": None},
        },
    },
    "tensorboard": {r"events\.out\.tfevents\..*": None},
    r"tuned(\.next)?": {r"[\w.-]+\.(safetensors|json|jinja|txt|model|md)": None},
}


@dataclass(frozen=True)
class Kind:
    """What a run trains: `noun`, the key of its trainings in config.json and of their results in
    summary.json; `names`, all that a training may have; `result`, the schema of a result."""

    noun: str
    names: Callable[[], Iterable[str]]
    result: dict

    @property
    def config(self) -> dict:
        return {self.noun: [str], **CONFIG}

    @property
    def summary(self) -> dict:
        return {self.noun: Each(self.result), **SUMMARY}


TRAIN = Kind("recipes", optimizers.labels, RESULT)


def _read_json(path: Path, schema, checksum: Callable[[dict], None] | None = None) -> dict:
    """A JSON file of ours; FileError, naming it, for anything else."""
    try:
        value = parse(read_text(path))
        if checksum is not None:
            checksum(value)
        check(value, schema, path.name)
    except SchemaError as error:
        raise FileError(f"{path} is damaged: {error}") from None
    return value


def differences(old: dict, new: dict, prefix: str = "") -> Iterator[str]:
    """ "key old (now new)" for every leaf in which two nested dicts differ."""
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} {json.dumps(a)} (now {json.dumps(b)})"


def changes(old: dict, new: dict) -> list[str]:
    """The differences between two configurations by which a run of the one does not continue as the
    other. More steps are none, nor the warmup that follows from them, nor the path of the text,
    which its fingerprint identifies."""
    free = {"data": None}
    before, now = old.get("steps"), new.get("steps")
    if isinstance(before, int) and isinstance(now, int) and before < now:
        free |= {"steps": None, "warmup": None}
    return list(differences(old | free, new | free))


class RunDir:
    """The folder `out` of a run. Raises UsageError for one that must not be written to."""

    def __init__(self, out: str | os.PathLike, kind: Kind = TRAIN):
        self.path, self.kind = expanded(out), kind
        self.config_path = self.path / "config.json"
        self.summary_path = self.path / "summary.json"
        self.plot_path = self.path / "loss.png"
        self.memory_plot_path = self.path / "memory.png"
        self.base_path = self.path / "base"
        self.lock_path = self.path / ".lock"

    def metrics_path(self, name: str) -> Path:
        return self.path / name / "metrics.jsonl"

    def checkpoint_path(self, name: str, part: int | None = None, parts: int | None = None) -> Path:
        file = "state" if part is None else f"state-tp{part}of{parts}"
        return self.path / name / "checkpoint" / f"{file}.safetensors"

    def tensorboard_path(self, name: str) -> Path:
        return self.path / name / "tensorboard"

    def tuned_path(self, name: str) -> Path:
        return self.path / name / "tuned"

    def check(self, config: dict, resume: bool = False, overwrite: bool = False) -> None:
        """Refuses to start a run of `config` here where that would lose or mix up results."""
        out = self.path
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is not a folder")
        self._refuse_links()
        if self.config_path.exists():
            if not (resume or overwrite):
                raise UsageError(
                    f"{out} holds a run already: --resume continues it, --overwrite replaces it"
                )
            found = changes(self._config(), config)
            if resume and found:
                raise UsageError(f"--resume: {out} was started with {', '.join(found)}")
        elif out.is_dir() and any(not name.startswith(".") for name in os.listdir(out)):
            raise UsageError(f"{out} holds other files and no run: choose another --out")
        elif resume and not self.lock_path.exists():  # a run that was killed early has its lock
            raise UsageError(f"--resume: {out} holds no run")

    def _config(self) -> dict:
        config = _read_json(self.config_path, dict)
        try:
            check(config, self.kind.config, "config.json")
        except SchemaError as error:
            raise UsageError(
                f"{self.path} holds other files and no run: {error}; choose another --out"
            ) from None
        return config

    def _refuse_links(self) -> None:
        files = (self.config_path, self.summary_path, self.lock_path, self.base_path)
        for path in (*files, *(path for name in self.kind.names() for path in self._paths(name))):
            if path.is_symlink():
                raise UsageError(f"{path} is a symbolic link: a run's folder holds none")

    def _paths(self, name: str) -> tuple[Path, ...]:
        checkpoint = self.checkpoint_path(name)
        paths = (self.metrics_path(name), self.tensorboard_path(name), checkpoint)
        paths += (self.tuned_path(name),)
        return (self.path / name, checkpoint.parent, *paths)

    @contextmanager
    def started(
        self, config: dict, resume: bool = False, base: Callable[[Path], None] | None = None
    ) -> Iterator[None]:
        """Makes the folder ready and keeps other processes out of it until the block ends. Without
        `resume` an earlier run's files go. `base` fills the new folder base/."""
        with locked(self.lock_path):
            if self.config_path.exists() and not resume:
                self._remove()
            if not self.config_path.exists() or self._config().get("steps") != config.get("steps"):
                write_text(self.config_path, json.dumps(config, indent=2) + "\n")
            if base is not None and not self.base_path.exists():
                with new_folder(self.base_path, "train") as inside:
                    base(inside)
            yield

    def _remove(self) -> None:
        """The files of any run; whatever else lies there stays."""
        for name in self.kind.names():
            remove_known(self.path / name, OURS)
        remove_known(self.base_path, BASE)
        for path in (self.summary_path, self.plot_path, self.memory_plot_path):
            path.unlink(missing_ok=True)
        # Last, so that a removal that was cut short can be repeated.
        self.config_path.unlink()

    def results(self, config: dict) -> dict:
        """{name: result} of the trainings of `config` that are done: none of them where it has more
        steps. UsageError for a summary that is damaged or of another run."""
        if not self.summary_path.exists():
            return {}
        summary = _read_json(self.summary_path, self.kind.summary, without_crc32)
        before = {key: value for key, value in summary["config"].items() if key != "parallel"}
        found = changes(before, config)
        if found:
            raise UsageError(f"{self.summary_path} is of a run with {', '.join(found)}")
        return summary[self.kind.noun] if before.get("steps") == config.get("steps") else {}

    def write_summary(self, summary: dict) -> None:
        """Writes `summary`, with a checksum as its `crc32`."""
        write_text(self.summary_path, json.dumps(with_crc32(summary), indent=2) + "\n")
