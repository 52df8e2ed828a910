"""Plain-torch oracles of every op: slow, short and plainly right. Tests compare against them.

Where an op promises bits, its oracle gives the bits; `gemm`, `grad_norm` and `adamw` are f64.
Scales decode: x ~= scale * q.
"""

# ruff: noqa: F401 - the names are for callers.

from .activation import (
    activate,
    activate_backward,
    activation,
    column_sum,
    normalize,
    normalize_backward,
    row_sum,
)
from .adam import (
    adamw,
    adamw_fp8,
    fp8_weight,
    join_master,
    settle_exp_avg,
    split_master,
    stochastic_bf16,
    toward_zero,
    update_bound,
)
from .adam4 import adamw_4bit, block_scales, rank1_scales
from .elementary import exp2_coarse, fma, log2_coarse
from .formats import (
    E4M3,
    E5M2,
    F16,
    FORMATS,
    MASTER_TO_FP8,
    MIN_SCALE,
    dither_noise,
    encode,
    encode_stochastic,
    magnitudes,
    philox,
    scale_from_amax,
    scale_max,
)
from .gemm import gemm, gemm_quantize, gemm_tolerance, tensor_core_tolerance
from .gradients import ROUNDED_UP, accumulate, grad_norm, ring_mean, shared_scale, two_shot
from .microadam import decode_error, micro_adam, micro_adam_state, round_outwards
from .nf4 import NF4_LEVELS, dynamic_map, nf4_decode, nf4_encode
from .quantize import (
    HISTORY,
    DelayedScale,
    cast_for_gemm,
    cast_layouts,
    cast_transpose,
    dequantize,
    expand_scale,
    load_groups,
    pad_for_gemm,
    quantize,
    save_groups,
)
from .rotate import rotate
from .states import (
    GROUP,
    LIFT,
    decode_state,
    encode_state,
    expand,
    expanded_scale,
    keep_nonzero,
    to_format,
)
from .subset import subset_adamw, subset_sums
