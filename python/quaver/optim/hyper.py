"""Hyperparameters on the device, where a captured step reads them."""

from __future__ import annotations

import torch
from torch import Tensor


class HyperTable:
    """One row of float64 for each parameter of a device's step, written when it changes."""

    def __init__(self):
        self._kept: dict[torch.device, tuple[list[Tensor], list[list[float]], Tensor]] = {}

    def on(self, device: torch.device, params: list[Tensor], rows: list[list[float]]) -> Tensor:
        """The rows of `params` as float64 [n, columns], in the same memory while n is the same."""
        kept = self._kept.get(device)
        # A copy from pageable memory would wait for the device.
        host = torch.tensor(rows, dtype=torch.float64) if kept is None or kept[1] != rows else None
        if host is not None and device.type == "cuda":
            host = host.pin_memory()
        if kept is None or len(kept[1]) != len(rows):
            table = host.to(device, non_blocking=True)
        else:
            table = kept[2]
            if host is not None:
                table.copy_(host, non_blocking=True)
        self._kept[device] = (params, rows, table)
        return table

    def rewrite(self, row_of: dict[Tensor, list[float]]) -> None:
        """Writes all tables again from the current row of each parameter."""
        for device, (params, _, _) in list(self._kept.items()):
            self.on(device, params, [row_of[p] for p in params])
