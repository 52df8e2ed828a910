"""Fake kernels: the shapes and dtypes that an op returns, for torch.compile and meta tensors."""

from __future__ import annotations

import functools

import torch


def fake(name: str):
    """Registers a function as the fake kernel of quaver::`name`.

    It raises RuntimeError for tensors on several devices, as the kernels do. An empty tensor in a
    list stands for none and may be on any device but meta, where nothing would be computed.
    """

    def register(kernel):
        arguments = getattr(torch.ops.quaver, name).default._schema.arguments
        names = [argument.name for argument in arguments]

        @functools.wraps(kernel)
        def checked(*args, **kwargs):
            _check_devices(name, dict(zip(names, args, strict=False)) | kwargs)
            return kernel(*args, **kwargs)

        torch.library.register_fake(f"quaver::{name}")(checked)
        return kernel

    return register


def _check_devices(op: str, given: dict) -> None:
    device = None
    for name, value in given.items():
        for t in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(t, torch.Tensor):
                continue
            device = device or t.device
            if t.device != device and ("meta" in (t.device.type, device.type) or t.numel()):
                raise RuntimeError(
                    f"{op}: {name} must be on {device} like the rest, got {t.device}"
                )
