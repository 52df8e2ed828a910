from ..recipe import SubsetNorm, Subspace
from .adamw import AdamW
from .grass import Grass
from .microadam import MicroAdam
from .release import Release, release_gradients
from .states import STATES, EncodedState, encode_state

__all__ = [
    "STATES",
    "AdamW",
    "EncodedState",
    "Grass",
    "MicroAdam",
    "Release",
    "SubsetNorm",
    "Subspace",
    "encode_state",
    "release_gradients",
]
