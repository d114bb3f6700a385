"""Tensors that ranks exchange in the middle of a step of training.

Nothing is said here of where a rank is or whether it failed, as `bnexp.ranks` does: that would cost
more than what is exchanged. A rank that fails closes its end instead; what the others wait for
breaks off, and they learn by `Ranks` why.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from bnexp.errors import RunFailed
from bnexp.ranks import TorchRanks

_BITS = 8


class Collectives:
    """Process groups of the ranks for tensors on `device`: NCCL on CUDA, gloo elsewhere.

    Made, and used, by all ranks alike. `group` is for `DistributedDataParallel`.
    """

    def __init__(self, ranks: TorchRanks, device: torch.device) -> None:
        backend = "nccl" if device.type == "cuda" else "gloo"
        self.size = ranks.size
        self.group: Any = _group(ranks, backend)
        self._flags: Any = self.group if backend == "gloo" else _group(ranks, "gloo")

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's `tensor`, of one shape on all: (size, ...), in rank order."""
        every = tensor.new_empty(self.size, *tensor.shape)
        # one call for NCCL, and for gloo the quickest
        distributed.all_gather(list(every.unbind()), tensor.contiguous(), group=self.group)
        return every

    def union(self, bits: int) -> Callable[[], int]:
        """Begin to join every rank's `bits` (0 to 255); what comes back waits for the union."""
        mine = torch.tensor([bits >> i & 1 for i in range(_BITS)], dtype=torch.uint8, device="cpu")
        work = distributed.all_reduce(
            mine, distributed.ReduceOp.MAX, group=self._flags, async_op=True
        )

        def joined() -> int:
            work.wait()
            return sum(bit << i for i, bit in enumerate(mine.tolist()))

        return joined

    def close(self) -> None:
        """Leave. Over gloo, what others wait for breaks off, once nothing here (a
        `DistributedDataParallel`, say) holds `group` any longer."""
        groups = {id(group): group for group in (self.group, self._flags) if group is not None}
        self.group = self._flags = None
        for group in groups.values():
            distributed.destroy_process_group(group)
        groups.clear()
        gc.collect()

    def __deepcopy__(self, memo: dict) -> Collectives:
        """A copy of a model is of the same rank."""
        return self


def has_broken_off(error: BaseException) -> bool:
    """Whether `error` says that an exchange with other ranks did not come to its end."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(n in str(error) for n in ("gloo", "NCCL"))


def broken_off(error: BaseException) -> RunFailed:
    why = " ".join(str(error).partition("] ")[2].split() or [type(error).__name__])
    return RunFailed(f"the exchange with the other ranks broke off ({why:.200})")


def _group(ranks: TorchRanks, backend: str) -> Any:
    return distributed.new_group(
        ranks.members, timeout=ranks.timeout, backend=backend, use_local_synchronization=True
    )
