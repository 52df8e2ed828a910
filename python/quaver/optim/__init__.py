from ..recipe import SubsetNorm, Subspace
from .adamw import AdamW
from .states import STATES, EncodedState, encode_state

__all__ = ["STATES", "AdamW", "EncodedState", "SubsetNorm", "Subspace", "encode_state"]
