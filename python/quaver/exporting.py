"""The command `quaver export`: a run's model, or a folder of transformers, in another format."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import torch

from . import checkpoint, distributed, models
from .convert import convert
from .errors import FileError, UsageError
from .export import FORMATS, export
from .files import expanded, opened, read_text
from .hf.folder import load_tokenizer
from .hf.pretrained import load_pretrained
from .hf.start import rebuild
from .nn.linear import is_converted
from .recipe import Recipe
from .recipe import get as recipe_of
from .rundir import RunDir
from .schedule import parameter_groups
from .schema import SchemaError, parse
from .tensor_file import TensorFile

__all__ = ["add_export", "load_run"]

# What transformers' tokenizers and processors keep in a folder.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
             "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json",
             "chat_template.jinja", "preprocessor_config.json",
             "processor_config.json")  # fmt: skip


def add_export(commands: argparse._SubParsersAction, formatter: type) -> None:
    p = commands.add_parser(
        "export",
        help="write a trained model as a folder that transformers loads",
        formatter_class=formatter,
        description="Write the model of a run of `quaver train`, or of a folder of transformers, "
        "as a folder that transformers loads, in bf16 or FP8.",
    )
    p.add_argument("model", metavar="DIR", help="a run's folder, or one of transformers")
    p.add_argument("--format", default="bf16", help=f"one of {', '.join(FORMATS)}")
    p.add_argument("--out", required=True, metavar="DIR", help="a new or an empty folder")
    p.add_argument("--recipe", metavar="NAME", help="of a run that trained several: which")
    p.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights")
    p.set_defaults(call=_export)


def _export(arguments: argparse.Namespace) -> None:
    source = expanded(arguments.model)
    config = _json(source / "config.json")
    tokenizer = _Files(source)
    if "data_sha256" in config:
        model, tokenizer = load_run(source, arguments.recipe), _Files(RunDir(source).base_path)
    elif arguments.recipe is not None:
        raise UsageError(f"--recipe is for a run's folder, and {source} is none")
    else:
        model = load_pretrained(source)
    print(
        export(
            model,
            arguments.out,
            arguments.format,
            tokenizer=tokenizer,
            max_shard_size=arguments.max_shard_size,
        )
    )


def _json(path: Path) -> dict:
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder")
    if not path.is_file():
        raise UsageError(f"{path.parent}: wanted a run's folder or one of transformers: it has no "
                         "config.json")  # fmt: skip
    try:
        config = parse(read_text(path, follow=True))
    except SchemaError as error:
        raise FileError(f"{path} is damaged: {error}") from None
    return config if isinstance(config, dict) else {}


class _Files:
    """The tokenizer's files of a folder, as a tokenizer that is written beside a model."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end token, where the folder has a tokenizer that names one."""
        if not (self.folder / "tokenizer_config.json").is_file():
            return None
        return load_tokenizer(self.folder, "export").eos_token_id

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        for name in TOKENIZER:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, Path(folder) / name)


def load_run(folder: str | os.PathLike, recipe: str | None = None) -> torch.nn.Module:
    """The trained model of a run's folder, converted as it was trained; of a run of several
    trainings the one called `recipe` (RECIPE, or RECIPE+OPTIMIZER).

    Raises UsageError for a folder, a checkpoint or a name that is none."""
    run = RunDir(folder)
    config = _json(run.config_path)
    if "methods" in config:
        raise UsageError(
            f"{run.path} is a run of `quaver tune`: export its {run.tuned_path('full')}, or merge "
            "its adapter into its model"
        )
    names = sorted(p.name for p in run.path.iterdir() if (p / "checkpoint").is_dir())
    if not names:
        raise UsageError(f"{run.path} holds no checkpoint of `quaver train`")
    if recipe is None and len(names) > 1:
        raise UsageError(f"{run.path} holds {', '.join(names)}: choose one by --recipe")
    name = names[0] if recipe is None else recipe
    if name not in names:
        raise UsageError(f"--recipe {name}: {run.path} holds {', '.join(names)}")
    path = run.checkpoint_path(name)
    if config.get("tensor_parallel", 1) > 1 or not path.exists():
        raise UsageError(
            f"{path.parent} holds parts of a model that tensor parallelism split; they are no "
            "model of one process"
        )
    try:
        started = "sha256" in config["model"]
        model = (
            rebuild(run.base_path) if started else models.build(models.Config(**config["model"]))
        )
        chosen = recipe_of(name.partition("+")[0])
        convert(model, chosen)
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{run.config_path} is damaged: {error}") from None
    if path.is_dir():
        distributed.load(path, model)
    elif chosen.replica is not None and _has_replicas(path):
        _load_masters(path, model, chosen)
    else:
        checkpoint.load(path, model)
    return model.eval()


def _has_replicas(path: Path) -> bool:
    """Whether ZeRO wrote a checkpoint: the model's own codes in FP8, the masters as states."""
    with opened(path) as stream:
        kinds = TensorFile(path, stream, checkpoint.FORMAT, checkpoint.VERSION).kinds
    return any(name.endswith(".master.qdata") for name in kinds)


def _load_masters(path: Path, model: torch.nn.Module, chosen: Recipe) -> None:
    """The weights of ZeRO's checkpoint, by the optimizer of a world of one, which owns them all."""
    optimizer = distributed.ZeroAdamW(parameter_groups(model), recipe=chosen)
    distributed.load(path, model, optimizer)
    for layer in model.modules():
        if is_converted(layer):
            master = optimizer.state[layer.weight]["master"]
            layer.weight = torch.nn.Parameter(master.detach())
            layer.refresh()
