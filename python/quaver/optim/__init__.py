from .adamw import AdamW
from .states import STATES, EncodedState, encode_state

__all__ = ["STATES", "AdamW", "EncodedState", "encode_state"]
