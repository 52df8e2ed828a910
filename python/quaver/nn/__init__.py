from .linear import Linear, LinearBase
from .mlp import MLP
from .norm import Norm
from .weight import cached_weights

__all__ = ["MLP", "Linear", "LinearBase", "Norm", "cached_weights"]
