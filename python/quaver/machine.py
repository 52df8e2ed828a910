"""Facts of this machine, and the backend that will run on it."""

import os
import platform
import re
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import quaver as qv
from quaver.errors import UsageError

__all__ = ["backends", "bf16_products", "choose_device", "describe", "why_not_cuda"]


def _cpu_name():
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe():
    """The machine and versions as a dict of plain values, as written into summaries."""
    build = qv.build_info()
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "quaver": build["version"],
        "cpu_isa": build["cpu_isa"],
    }
    if torch.cuda.is_available():
        machine["gpus"] = [_gpu(i) for i in range(torch.cuda.device_count())]
        machine["driver"], served = _driver(), _served()
        machine["driver_cuda"] = served and f"{served // 1000}.{served % 1000 // 10}"
        machine["cuda"] = torch.version.cuda
    return machine


def _gpu(index):
    p = torch.cuda.get_device_properties(index)
    arch = f"sm_{p.major}{p.minor}"
    return (
        f"{p.name} ({arch}, {p.multi_processor_count} multiprocessors, "
        f"{p.total_memory / 2**30:.0f} GiB)"
    )


def _driver():
    """The kernel module's version, such as 580.65.06; None where there is no file that says it."""
    path = Path("/proc/driver/nvidia/version")
    if not path.is_file():
        return None
    found = re.search(r"\s(\d+(?:\.\d+)+)\s", path.read_text(encoding="utf-8", errors="replace"))
    return found and found[1]


def _served():
    """The newest CUDA that the driver serves, such as 12080 for 12.8; None without a driver."""
    version = getattr(torch._C, "_cuda_getDriverVersion", None)  # in a torch with CUDA
    return version and version()


def why_not_cuda():
    """The reason why the CUDA backend cannot run here, in a few words; None if it can."""
    if not qv.build_info()["cuda"]:
        return "this build of quaver has no CUDA backend (build with QUAVER_CUDA=on)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no usable NVIDIA GPU or driver"
    # torch may have an older runtime than this build, and run where no kernel of ours would.
    runtime, served = qv.build_info()["cuda_runtime"], _served()
    if served is not None and served // 1000 < int(runtime.partition(".")[0]):
        return (
            f"the driver serves CUDA up to {served // 1000}.{served % 1000 // 10}, and this build "
            f"has the runtime of CUDA {runtime}; update the driver"
        )
    return _without_code(torch.cuda.get_device_capability(), qv.build_info()["cuda_archs"])


def _without_code(capability, archs):
    """Why machine code for `archs` does not run on a GPU of this capability; None if it does: code
    of sm_80 runs on 8.0 to 8.9, that of sm_90a on 9.0 alone."""
    major, minor = capability
    for arch in archs:
        number = int(arch.rstrip("af"))
        exact = arch.endswith("a")
        if number // 10 == major and (number % 10 == minor if exact else number % 10 <= minor):
            return None
    name, wanted = torch.cuda.get_device_name(), f"{major}{minor}{'a' * (major == 9)}"
    return (
        f"{name} has compute capability {major}.{minor}, and this build has code for "
        f"{', '.join('sm_' + arch for arch in archs)}; build with QUAVER_CUDA_ARCHS={wanted}"
    )


def choose_device(name):
    """torch.device for auto, cpu or cuda. Raises UsageError saying why CUDA cannot run."""
    if name == "cpu":
        return torch.device("cpu")
    reason = why_not_cuda()
    if name == "cuda" and reason:
        raise UsageError(f"--device cuda: {reason}")
    return torch.device("cpu" if reason else "cuda")


def backends():
    """{op: devices that this build has a kernel for}, of all ops in torch.ops.quaver."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = sorted(
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("quaver::")
    )
    return {
        op.removeprefix("quaver::"): [key.lower() for key in ("CPU", "CUDA") if has(op, key)]
        for op in ops
    }


class F32Products(TorchDispatchMode):
    """While it is entered, bf16 matrix products on the CPU are taken in f32 and rounded once.

    A bf16 product with f32 accumulation gives the same, up to the order of the sum.
    """

    PRODUCTS = frozenset((torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        low = [isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in args]
        if func.overloadpacket not in self.PRODUCTS or not all(low) or not args[0].is_cpu:
            return func(*args, **kwargs)
        return func(*(a.float() for a in args), **kwargs).bfloat16()


def bf16_products(device):
    """A context in which bf16 products on `device` have a usable speed. Without AVX-512, oneDNN
    takes bf16 apart value by value, so a step of bf16 lasts some 20 times as long as one of f32."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return nullcontext() if device.type != "cpu" or wide else F32Products()
