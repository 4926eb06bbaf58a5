"""How many KV blocks there are, and their memory."""

from __future__ import annotations

import torch

from batching.worker.attention import AttentionBackend, LayerSpec
from batching.worker.protocol import UnsupportedModelError, WorkerConfig

GIB = 1 << 30
AUTO_TOKENS = 1024  # of each sequence, that the automatic size makes room for


def block_bytes(
    backend: AttentionBackend, specs: list[LayerSpec], block_size: int, dtype: torch.dtype
) -> int:
    """Bytes of one block's keys and values over all layers."""
    return sum(backend.page_bytes(spec, block_size, dtype) for spec in specs)


def choose_num_blocks(
    config: WorkerConfig,
    max_model_len: int,
    bytes_per_block: int,
    free: int,
    step: int,
    *,
    is_cpu: bool,
) -> int:
    """The number of blocks that was asked for, or that fits.

    The automatic size is `memory_fraction` of the free bytes, less those that a step takes. On the
    CPU, where memory is shared with others, it is also at most `AUTO_TOKENS` tokens for each of
    `max_sequences`.

    Raises `UnsupportedModelError` if one sequence of `max_model_len` tokens does not fit.
    """
    needed = -(-max_model_len // config.block_size)
    if config.num_blocks is not None:
        blocks = config.num_blocks
    elif config.kv_cache_gib is not None:
        blocks = int(config.kv_cache_gib * GIB) // bytes_per_block
    else:
        blocks = max(0, int(free * config.memory_fraction) - step) // bytes_per_block
        if is_cpu:
            each = -(-min(max_model_len, AUTO_TOKENS) // config.block_size)
            blocks = min(blocks, max(needed, config.max_sequences * each))
    if blocks < needed:
        fits = blocks * config.block_size
        taken, smaller = "", ""
        if step:
            taken = f", of which the largest step takes {step / GIB:.2f}"
            smaller = ", or take smaller steps (max_step_tokens, max_sequences)"
        raise UnsupportedModelError(
            f"the KV cache has room for {fits} tokens ({blocks * bytes_per_block / GIB:.2f} GiB of "
            f"{free / GIB:.2f} GiB free{taken}), but one sequence of max_model_len {max_model_len} "
            f"needs {needed * bytes_per_block / GIB:.2f} GiB: set max_model_len to {fits} or less, "
            f"or allow more memory (kv_cache_gib, num_blocks, memory_fraction){smaller}"
        )
    return blocks
