"""Small Llama and GPT models for `quaver train`, the tests and the benches."""

from .config import PRESETS, Config, ConfigError, load
from .gpt import GPT
from .llama import Llama

__all__ = ["GPT", "PRESETS", "Config", "ConfigError", "Llama", "build", "load"]


def build(config):
    """The model of `config`, initialised from torch's default generator."""
    return {"llama": Llama, "gpt": GPT}[config.family](config)
