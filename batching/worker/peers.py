"""What the ranks of a tensor-parallel worker tell each other, besides what layers exchange."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
START_TIMEOUT = timedelta(minutes=30)  # ranks may load at very different speeds


class Peers:
    """This rank among `size`. All ranks must call the same methods in the same order."""

    def __init__(self, rank: int, size: int, meeting: str, device_type: str) -> None:
        """Returns when all ranks have come to the file `meeting`."""
        self.rank, self.size = rank, size
        dist.init_process_group(
            BACKENDS[device_type],
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=size,
            timeout=START_TIMEOUT,
        )

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        least = torch.tensor(number)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def agree(self, tokens: torch.Tensor) -> None:
        """Overwrite every rank's tokens with rank 0's, on the device."""
        dist.broadcast(tokens, 0)
