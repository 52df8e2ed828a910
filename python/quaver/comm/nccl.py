"""A communicator over the NCCL that torch brings, held by quaver's own library.

Its collectives run in the current stream and move bytes of any format.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor

_ops = torch.ops.quaver
ID_BYTES = 128
FAILED = b"failed: "  # begins no id


class Nccl:
    """The ranks of `store` with one CUDA device each, the current one. Collective, so is each call.

    Args:
        store: a torch.distributed Store that all ranks share; it carries NCCL's id once.
        name: distinguishes communicators of one store.
        timeout: seconds to wait for the other ranks while connections are made.
        library: NCCL to open instead of libnccl.so.2.
        host: move host memory, which NCCL itself cannot: for stand-ins of it.

    Raises RuntimeError where the store has no answer, ValueError where NCCL does not load or fails.
    An error aborts the communicator for good; its peers see an error, and none waits.
    """

    def __init__(self, store, rank: int, size: int, *, name: str = "quaver", timeout: float = 300.0,
                 library: str = "", host: bool = False):  # fmt: skip
        self.rank, self.size = rank, size
        self._number, self._host = None, host
        key = f"{name}/nccl_id"
        made = torch.zeros(ID_BYTES, dtype=torch.uint8)
        if rank == 0:
            try:
                _ops.comm_id_(made, library)
            except ValueError as error:  # the others need not wait for it
                store.set(key, FAILED + str(error).encode())
                raise
            store.set(key, bytes(made.tolist()))
        else:
            try:
                store.wait([key], timedelta(seconds=timeout))
            except RuntimeError as error:
                raise RuntimeError(
                    f"Nccl: rank {rank} of {size} waited {timeout} s for rank 0's id at {store}: "
                    f"{error}"
                ) from error
            found = store.get(key)
            if found.startswith(FAILED):
                raise ValueError(f"Nccl: rank 0 has no id: {found[len(FAILED) :].decode()}")
            made = torch.tensor(list(found), dtype=torch.uint8)
        self._number = _ops.comm_create(made, rank, size, timeout, library, host)

    def all_to_all(
        self,
        recv: Tensor,
        send: Tensor,
        recv_bytes: list[int] | None = None,
        send_bytes: list[int] | None = None,
    ) -> None:
        """Part p of `send` goes to rank p; part p of `recv` comes from it. Parts are equal, or of
        that many bytes. Ranks between which all parts are empty need not call it together."""
        number = self._open("all_to_all")
        sent, got = send_bytes or self._equal(send), recv_bytes or self._equal(recv)
        _ops.comm_all_to_all_(number, send, sent, recv, got)

    def all_gather(self, recv: Tensor, send: Tensor) -> None:
        """`recv` becomes the `send` of every rank, in their order."""
        _ops.comm_all_gather_(self._open("all_gather"), send, recv)

    def broadcast(self, values: Tensor, root: int) -> None:
        """`values` becomes that of rank `root`."""
        _ops.comm_broadcast_(self._open("broadcast"), values, root)

    def max_(self, values: Tensor) -> None:
        """The elementwise maximum over the ranks, in place."""
        _ops.comm_all_reduce_(self._open("max_"), values, "max")

    def sum_(self, values: Tensor) -> None:
        """The sum over the ranks, in place, in NCCL's order; FP8 rounds and saturates at every
        addition, and needs `sums_fp8`."""
        _ops.comm_all_reduce_(self._open("sum_"), values, "sum")

    @property
    def sums_fp8(self) -> bool:
        """Whether this NCCL, and this rank's device, add FP8: 2.24 or newer on sm_90 or newer."""
        able = self._host or torch.cuda.get_device_capability() >= (9, 0)
        return able and _ops.comm_sums_fp8(self._open("sums_fp8"))

    def check(self) -> None:
        """Raises ValueError if anything has failed since, on whatever rank."""
        _ops.comm_check(self._open("check"))

    def abort(self) -> None:
        """Ends calls that wait for a lost rank; any thread may call it. Peers get errors."""
        if self._number is not None:
            number, self._number = self._number, None
            _ops.comm_abort(number)

    def close(self) -> None:
        """Releases the communicator; to be called when its work is done."""
        if self._number is not None:
            number, self._number = self._number, None
            _ops.comm_close(number)

    def _equal(self, x: Tensor) -> list[int]:
        part, left = divmod(x.nbytes, self.size)
        if left:
            raise ValueError(
                f"Nccl.all_to_all: wanted bytes that divide by {self.size} ranks, got {x.nbytes}"
            )
        return [part] * self.size

    def _open(self, op: str) -> int:
        if self._number is None:
            raise ValueError(f"Nccl.{op}: the communicator of rank {self.rank} is closed")
        return self._number
