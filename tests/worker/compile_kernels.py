"""Compiles the Triton kernels for GPUs that need not be here, and says what they would occupy.

    python -m tests.worker.compile_kernels

Fails where a kernel does not compile, or wants more shared memory than its table allows for.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batching.worker import attention_kernels as kernels
from batching.worker import draw_kernel, few_rows, fused_kernels, quantized_kernel, slot_kernels
from batching.worker.attention import LayerSpec
from batching.worker.attention_triton import (
    FLOAT32_TILES,
    SMALL_TILES,
    TILES,
    Tiles,
    constants,
)

BLOCK = 32
HOPPER, ADA = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 89, 32)
MI300 = GPUTarget("hip", "gfx942", 64)
SCALARS = {"inner": "fp32", "outer": "fp32", "epsilon": "fp32"}


def compile_kernel(
    kernel: Any,
    target: GPUTarget,
    dtype: str,
    given: dict[str, Any],
    warps: int = 4,
    **stored: str,
) -> Any:
    """The compiled kernel, its pointers aligned as torch's are."""
    pointers = {"tables": "*i32", "work": "*i32", "sinks": "*fp32", "partials": "*fp32",
                "sums": "*fp32", "arrived": "*i32", "slots": "*i64", "logits": "*fp32",
                "keys": "*i32", "temperature": "*fp32", "top_k": "*i64", "top_p": "*fp32",
                "min_p": "*fp32", "bounds": "*fp32", "tokens": "*i64"}  # fmt: skip
    data = ("query", "key", "value", "key_pages", "value_pages", "output", "x", "scales", "lows",
            "weight", "norm", "bias", "qkv", "cos", "sin", "query_norm", "key_norm",
            "gate_up")  # fmt: skip
    pointers |= dict.fromkeys(data, f"*{dtype}") | {n: f"*{kind}" for n, kind in stored.items()}
    signature = {}
    for name in kernel.arg_names:
        kind = "constexpr" if name in given else pointers.get(name) or SCALARS.get(name, "i32")
        signature[name] = kind
    strided = ("query_token", "query_head", "key_token", "key_head", "value_token", "value_head",
               "x_row")  # fmt: skip
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in strided
    }
    source = ASTSource(kernel, signature, constexprs=given, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": warps})


def registers(cubin: bytes) -> str:
    """Registers of a thread, and bytes that it spills."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    return f"{found[1]} registers, {found[2]} bytes spilled" if found else ""


def report(built: Any, what: str, limit: int) -> None:
    """Says what a program occupies. Fails where it spills much, or takes more shared memory."""
    usage = registers(built.asm["cubin"]) if "cubin" in built.asm else ""
    print(f"{what}: {built.metadata.shared} bytes shared, {usage}", flush=True)
    assert built.metadata.shared <= limit
    spilled = re.search(r"(\d+) bytes spilled", usage)
    assert spilled is None or int(spilled[1]) <= 16  # Triton 3.6 spills a little where 3.7 does not


def compile_attention(
    target: GPUTarget, dim: int, dtype: str, tiles: Tiles, pages: str = "", **rest: Any
) -> None:
    precision = "ieee" if target.backend == "hip" else "tf32x3"
    spec = LayerSpec(32, 8, dim, 1.0, **rest)
    for single, tile in enumerate((tiles.prompt, tiles.single)):
        given = {**constants(spec, tile, BLOCK), "SINGLE": bool(single), "PRECISION": precision}
        if spec.sinks is None:
            given["sinks"] = None
        kept = dict.fromkeys(("key_pages", "value_pages"), pages or dtype)
        built = compile_kernel(kernels.attend, target, dtype, given, tile.warps, **kept)
        what = f"{target.arch} {dtype} {pages} head size {dim} {'single' if single else 'prompt'}"
        report(built, what, limit=(227 if tiles in TILES.values() else 64) << 10)


def compile_product(target: GPUTarget, dtype: str, codes: str, rows: int) -> None:
    tiles = quantized_kernel.constants(rows, 128, halves=codes == "u8")
    warps = tiles.pop("num_warps")
    given = {**tiles, "OUTPUTS": 4096, "INPUTS": 4096, "GROUP": 128, "BIASED": False, "bias": None,
             "PRECISION": "ieee" if target.backend == "hip" else "tf32x3"}  # fmt: skip
    if codes != "u8":
        given["lows"] = None
    built = compile_kernel(quantized_kernel.product, target, dtype, given, warps, codes=codes)
    limit = (64 if target.backend == "hip" else 99) << 10  # bytes that every one of them has
    report(built, f"{target.arch} {dtype} product with {codes}, {rows} rows", limit)


def compile_fused(target: GPUTarget, pages: str) -> None:
    """For a layer of the shape of Llama-3.1-8B, with Qwen3's norms."""
    kept = dict.fromkeys(("key_pages", "value_pages"), pages)
    rows = {"WIDTH": 4096, "PADDED": 4096}
    heads = {"KV_HEADS": 8, "QUERIES": 32, "QUERIES_PADDED": 32, "KEYS_PADDED": 8, "HALF": 64,
             "HALF_PADDED": 64, "BLOCK": BLOCK, "NORMED": True, "PAGED": True}  # fmt: skip
    piece = {"WIDTH": 14336, "PIECE": 1024}
    for kernel, given, warps in (
        (fused_kernels.normalize, rows, 8),
        (fused_kernels.rotate_and_write, heads, 4),
        (fused_kernels.activate, piece, 4),
    ):
        built = compile_kernel(kernel, target, "bf16", given, warps, **kept)
        report(built, f"{target.arch} bf16 {kernel.__name__}", limit=48 << 10)


def compile_few_rows(target: GPUTarget, rows: int) -> None:
    """The products of layers of Qwen3-0.6B's and Llama-3.1-8B's shapes."""
    limit = (227 if target.arch == HOPPER.arch else 64) << 10
    for inputs, flags in (
        (1024, ("NORMED", "BIASED")),
        (1024, ("NORMED", "PAIRED")),
        (2048, ("ADDED",)),
        (3072, ("ADDED",)),
        (4096, ("NORMED", "BIASED")),
        (4096, ("NORMED", "PAIRED")),
        (14336, ("ADDED",)),
    ):
        shape = torch.empty(rows, inputs, dtype=torch.bfloat16, device="meta")
        if few_rows.is_for(shape, nn.Linear(1, 1), normed="NORMED" in flags):
            tiles = few_rows.constants(rows, inputs, limit)
            warps, early = tiles.pop("num_warps"), target.arch == HOPPER.arch
            given = {**tiles, "INPUTS": inputs, "OUTPUTS": 4096, "EARLY": early}
            given |= {flag: flag in flags for flag in ("NORMED", "BIASED", "PAIRED", "ADDED")}
            absent = {"norm": "NORMED", "bias": "BIASED"}
            given |= {name: None for name, flag in absent.items() if flag not in flags}
            built = compile_kernel(few_rows.few_rows, target, "bf16", given, warps)
            what = f"{target.arch} {rows} rows of {inputs} {' '.join(flags).lower()}"
            report(built, what, limit)


def compile_draws(target: GPUTarget, dtype: str) -> None:
    kept = {"logits": dtype, "rows": "i32", "top_k": "i32", "sums": "fp32", "found": "i32"}
    row = {"COUNT": 151936}
    for kernel, given, warps in (
        (draw_kernel.find_bounds, row | {"PIECE": draw_kernel.PIECE}, draw_kernel.WARPS),
        (draw_kernel.take_noisiest, row | {"PIECE": draw_kernel.NOISE_PIECE}, 4),
        (draw_kernel.write_winners, {"MOST": draw_kernel.MOST_PARTS}, 1),
    ):
        named = {name: kind for name, kind in kept.items() if name in kernel.arg_names}
        built = compile_kernel(kernel, target, dtype, given, warps, **named)
        report(built, f"{target.arch} {dtype} {kernel.__name__}", limit=48 << 10)


def compile_inputs(target: GPUTarget) -> None:
    kept = dict.fromkeys(("rows", "columns", "table", "slots", "starts"), "i32")
    kept |= dict.fromkeys(("tokens", "positions", "places"), "i64")
    for kernel, values in (
        (slot_kernels.write_at, "i32"),
        (slot_kernels.write_at, "i64"),
        (slot_kernels.write_inputs, ""),
    ):
        kinds = kept | {"values": values}
        named = {name: kind for name, kind in kinds.items() if name in kernel.arg_names}
        given = {name: 32 for name in ("BLOCK", "PIECE") if name in kernel.arg_names}
        built = compile_kernel(kernel, target, "bf16", given, **named)
        report(built, f"{target.arch} {kernel.__name__}", limit=48 << 10)


def main() -> None:
    for dim in TILES:
        compile_attention(HOPPER, dim, "bf16", TILES[dim])
    sinks = torch.zeros(32)
    compile_attention(HOPPER, 72, "fp16", TILES[128], window=128, softcap=30.0, sinks=sinks)
    compile_attention(HOPPER, 128, "fp32", FLOAT32_TILES[128])
    compile_attention(ADA, 256, "bf16", SMALL_TILES[256])
    compile_attention(MI300, 128, "bf16", SMALL_TILES[128])
    compile_attention(HOPPER, 64, "bf16", TILES[64], "fp8e4nv")
    compile_attention(HOPPER, 128, "bf16", TILES[128], "fp8e4nv")
    compile_attention(MI300, 128, "bf16", SMALL_TILES[128], "fp8e4nv")
    sizes = {"HEADS": 8, "DIM": 128, "WIDTH": 128}
    paged = {**sizes, "HEADS_PADDED": 8, "BLOCK": BLOCK}
    for target in (HOPPER, MI300):
        for kept in ("bf16", "fp8e4nv"):
            pages = dict.fromkeys(("key_pages", "value_pages"), kept)
            compile_kernel(kernels.write_pages, target, "bf16", paged, **pages)
        compile_fused(target, "bf16")
        compile_inputs(target)
        for dtype in ("fp32", "bf16"):
            compile_draws(target, dtype)
    compile_fused(HOPPER, "fp8e4nv")
    for rows in (1, 2, 4, 16):
        compile_few_rows(HOPPER, rows)
    for target in (ADA, MI300):
        compile_few_rows(target, 1)
        compile_few_rows(target, 16)
    for codes in ("i8", "fp8e4nv", "u8"):
        for rows in quantized_kernel.TILES:
            compile_product(HOPPER, "bf16", codes, rows)
        for target in (ADA, MI300):
            compile_product(target, "bf16", codes, max(quantized_kernel.TILES))


if __name__ == "__main__":
    main()
