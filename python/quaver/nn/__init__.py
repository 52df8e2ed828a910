from .linear import Linear
from .mlp import MLP
from .norm import Norm

__all__ = ["MLP", "Linear", "Norm"]
