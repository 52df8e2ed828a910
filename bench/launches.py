"""Launches of the CUDA backend, counted on a machine without a GPU.

`load()` puts build/release/launches/libquaver.so in place of quaver's library: the binding and the
kernels' host code as they ship, on CPU tensors, with a log where kernels are started. aten's
launches are the ops in a profile that have a kernel of their own: one each, except for those whose
CUDA code is known to start more. RMSNorm is one op each way, as on CUDA; the CPU composes it.
"""

import ctypes
import functools
import sys
from collections import Counter
from pathlib import Path

import torch

LIBRARY = Path(__file__).resolve().parents[1] / "build/release/launches/libquaver.so"

# Ops that start no kernel: they allocate, or give another view.
NO_KERNEL = {
    "_unsafe_view", "alias", "as_strided", "as_strided_", "chunk", "contiguous", "detach",
    "detach_", "empty", "empty_like", "empty_strided", "expand", "expand_as", "flatten",
    "is_same_size", "item", "lift_fresh", "_local_scalar_dense", "movedim", "narrow", "new_empty",
    "new_empty_strided", "numpy_T", "permute", "_reshape_alias", "reshape", "resize_",
    "resolve_conj", "resolve_neg", "result_type", "select", "set_", "slice", "split",
    "split_with_sizes", "squeeze", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze",
    "view", "view_as", "_has_compatible_shallow_copy_type",
}  # fmt: skip

# What CUDA starts for an op, where that is not one kernel.
KERNELS = {
    "_fused_rms_norm_backward": 3,  # of the input, and of the weight in two steps
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,  # row sums, products, dq to its type
}


def _fused_rms_norm(library) -> None:
    """Gives the CPU the ops that CUDA has for RMSNorm."""

    def forward(x, shape, weight, eps):
        rstd = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        return (x * rstd * weight).to(x.dtype), rstd

    def backward(dy, x, shape, rstd, weight, mask):
        return torch.empty_like(x), torch.empty_like(weight)  # only counted

    library.impl("_fused_rms_norm", forward, "CPU")
    library.impl("_fused_rms_norm_backward", backward, "CPU")


def load():
    """Imports quaver over the library that logs. In a process that has not imported it."""
    assert "quaver" not in sys.modules, "the other library is loaded already"
    if not LIBRARY.exists():
        raise FileNotFoundError(
            f"{LIBRARY} is missing: cmake --build build/release --target quaver_launches"
        )
    library = ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)  # quaver._C finds it by its name
    library.quaver_launches_begin.argtypes = [ctypes.c_bool]
    library.quaver_launches_log.restype = ctypes.c_char_p
    library.aten = torch.library.Library("aten", "IMPL")
    _fused_rms_norm(library.aten)
    import quaver

    return library, quaver


@functools.cache
def has_kernel(name: str) -> bool:
    """Whether an aten op has a kernel of the CPU's own in some overload, and composes nothing."""
    packet = getattr(torch.ops.aten, name, None)
    names = [getattr(packet, o).name() for o in packet.overloads()] if packet else []
    return any(
        torch._C._dispatch_has_kernel(name)  # some are Python's alone
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
        for name in names
    )


def aten(events) -> Counter:
    """Kernels of aten by op, from a profile's events."""
    found = Counter()

    def visit(event) -> bool:
        name = event.name.removeprefix("aten::")
        ours = event.name != name and name not in NO_KERNEL
        children = [] if ours and has_kernel(name) else event.cpu_children
        inside = sum(visit(child) for child in children) > 0
        if ours and not inside:
            found[name] += KERNELS.get(name, 1)
        return ours or inside

    for event in events:
        if event.cpu_parent is None:
            visit(event)
    return found


def count(library, run, kernels=False) -> Counter:
    """Launches and clearings of `run()` by op, ours and aten's. Our kernels run if `kernels`."""
    library.quaver_launches_begin(kernels)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    ours = Counter(library.quaver_launches_log().decode().split("\n")[:-1])
    return Counter({f"quaver {op}": n for op, n in ours.items()}) + Counter(
        {f"aten {op}": n for op, n in aten(profile.events()).items()}
    )
