from .frozen import FrozenLinear
from .linear import Conv1D, Linear, LinearBase
from .mlp import MLP
from .norm import Norm
from .weight import cached_weights

__all__ = ["MLP", "Conv1D", "FrozenLinear", "Linear", "LinearBase", "Norm", "cached_weights"]
