"""FP8 training for PyTorch."""

import importlib

from quaver._load import load as load_library

_C = load_library()  # before the rest: it registers torch.ops.quaver
build_info = _C.build_info
__version__ = build_info()["version"]

from . import nn, optim, recipe, tensor_ops  # noqa: E402, F401
from .activations import saved_activations  # noqa: E402
from .checkpoint import CheckpointError, load, save  # noqa: E402
from .convert import convert, convert_report, restore  # noqa: E402
from .export import ExportReport, export  # noqa: E402
from .grad import clip_grad_norm_  # noqa: E402
from .memory import memory_report  # noqa: E402
from .nf4 import NF4Weight, quantize_nf4  # noqa: E402
from .nn import cached_weights  # noqa: E402
from .ops import cast_transpose, dequantize, gemm, quantize  # noqa: E402
from .optim import (  # noqa: E402
    AdamW,
    Grass,
    MicroAdam,
    SubsetNorm,
    Subspace,
    release_gradients,
)
from .tensor import ScaledTensor  # noqa: E402

__all__ = [
    "AdamW",
    "CheckpointError",
    "ExportReport",
    "Grass",
    "MicroAdam",
    "NF4Weight",
    "ScaledTensor",
    "SubsetNorm",
    "Subspace",
    "__version__",
    "build_info",
    "cached_weights",
    "cast_transpose",
    "clip_grad_norm_",
    "convert",
    "convert_report",
    "dequantize",
    "distributed",
    "export",
    "gemm",
    "load",
    "load_pretrained",
    "memory_report",
    "nn",
    "optim",
    "plan",
    "quantize",
    "quantize_nf4",
    "recipe",
    "release_gradients",
    "restore",
    "save",
    "saved_activations",
    "side_tune",
    "use_gemm_table",
    "watch",
]

# What a loop on one device does without is imported where it is first used, by (module, name).
_LATER = {
    "distributed": ("distributed", None),
    "lightning": ("lightning", None),
    "load_pretrained": ("hf.pretrained", "load_pretrained"),
    "plan": ("planning", "plan"),
    "side_tune": ("nn.side", "side_tune"),
    "torchtitan": ("torchtitan", None),
    "use_gemm_table": ("gemm_table", "use_gemm_table"),
    "watch": ("watching", "watch"),
}


def __getattr__(name):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LATER[name]
    found = importlib.import_module(f"{__name__}.{module}")
    return found if attribute is None else getattr(found, attribute)


def __dir__():
    return sorted({*globals(), *__all__})
