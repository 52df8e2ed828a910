"""The shape of a model as frozen data, from a preset or a JSON file."""

import dataclasses
from dataclasses import dataclass

from ..errors import FileError, UsageError
from ..files import expanded, read_text
from ..schema import SchemaError, parse

__all__ = ["PRESETS", "Config", "ConfigError", "load"]

FAMILIES = ("llama", "gpt")
LIMIT = 2**31  # of every number


class ConfigError(UsageError):
    """A model configuration that cannot be built; the text names the field."""


@dataclass(frozen=True)
class Config:
    """Sizes of a decoder-only transformer.

    `ffn` is the hidden width of the MLP, `context` the longest sequence in tokens. `kv_heads` below
    `heads` is grouped-query attention. `rope_theta` is read by the llama family alone.
    Raises ConfigError naming the field that is of a wrong type or does not fit the others.
    """

    family: str = "llama"
    vocab: int = 256
    dim: int = 384
    layers: int = 3
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 1024
    context: int = 1024
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        for field in dataclasses.fields(self):
            self._check_type(field.name, field.type)
        if self.family not in FAMILIES:
            raise ConfigError(f"family must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        if self.dim % self.heads:
            raise ConfigError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )
        if self.family == "llama" and self.head_dim % 2:
            raise ConfigError(f"dim / heads must be even to rotate, got {self.head_dim}")

    def _check_type(self, name, kind):
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and value >= LIMIT:
            raise ConfigError(f"{name} must be below 2^31")
        if kind is int and not (number and isinstance(value, int) and value > 0):
            raise ConfigError(f"{name} must be a positive whole number, got {value!r}")
        if kind is float and not (number and value > 0):
            raise ConfigError(f"{name} must be a positive number, got {value!r}")
        if kind is bool and not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, got {value!r}")

    @property
    def head_dim(self):
        return self.dim // self.heads

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def as_dict(self):
        return dataclasses.asdict(self)


PRESETS = {
    "tiny": Config(),
    "125m": Config(vocab=32000, dim=768, layers=12, heads=12, kv_heads=12, ffn=2048, context=2048),
    "350m": Config(vocab=32000, dim=1024, layers=24, heads=16, kv_heads=16, ffn=2816, context=2048),
    "1b": Config(vocab=32000, dim=2048, layers=22, heads=32, kv_heads=4, ffn=5632, context=2048),
    "7b": Config(vocab=32000, dim=4096, layers=32, heads=32, kv_heads=32, ffn=11008, context=4096),
}


def load(name):
    """The Config of a preset's name or of a JSON file (an object of Config's fields; absent ones
    keep their defaults). ConfigError for an unknown preset or field, or an unreadable file."""
    if name in PRESETS:
        return PRESETS[name]
    path = expanded(name)
    if path.suffix != ".json":
        raise ConfigError(
            f"unknown model {name!r}: give one of {', '.join(PRESETS)}, a .json file, or a folder "
            "of transformers that exists"
        )
    try:
        values = parse(read_text(path, follow=True))
    except FileError as error:
        raise ConfigError(f"--model {error}") from None
    except SchemaError as error:
        raise ConfigError(f"{name} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must hold a JSON object, got {type(values).__name__}")
    known = {field.name for field in dataclasses.fields(Config)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"{name} has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    try:
        return Config(**values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
