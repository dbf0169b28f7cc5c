#!/usr/bin/env python3
"""How fast is a streamed block, and how much GPU memory does it take?

    python benchmarks/streamed_block.py --output block.json

Runs one transformer block (Llama-3-8B's geometry by default) forward and backward through the real code, everything
offloaded, and prints model TFLOP/s (causal attention once, no recompute), the ratio to an 8192^3 bf16 matrix product of
the same run, and the peak GPU memory above weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron.config import ModelConfig
from megatron.core.parallel_state import ParallelState
from megatron.logging.accounting import forward_flops
from megatron.model.builder import Execution, build_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536, 131072, 262144], help="tokens")
    parser.add_argument("--chunks", type=int, nargs="+", default=[32768], help="tokens per chunk")
    parser.add_argument("--key-value-heads", type=int, default=8)
    parser.add_argument("--backends", nargs="+", default=["auto"])
    parser.add_argument("--on-device", action="store_true", help="also without offloading")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU")
    product = matmul_tflops()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, 8192^3 bf16 product {product:.0f} TFLOP/s")
    rows = []
    for length in arguments.lengths:
        for chunk in arguments.chunks:
            for backend in arguments.backends:
                for offloading in (True, False) if arguments.on_device else (True,):
                    rows.append(
                        measure(
                            length, chunk, arguments.key_value_heads, backend, offloading, arguments.repeats, product
                        )
                    )
                    print(format_row(rows[-1]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps({"matmul_tflops": product, "rows": rows}, indent=2))
    return 0


def matmul_tflops() -> float:
    """Rate of an 8192^3 bf16 product on random data, median of 20."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / statistics.median(timed(torch.matmul, a, b)[1] for _ in range(20)) / 1e12


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """(result, seconds until the device has finished)."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = work(*arguments)
    torch.cuda.synchronize()
    return result, time.perf_counter() - started


def measure(
    length: int, chunk: int, key_value_heads: int, backend: str, offloading: bool, repeats: int, product: float
) -> dict[str, Any]:
    """Median forward and backward seconds of one block after a warm-up run."""
    config = ModelConfig(
        num_layers=1, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32,
        num_key_value_heads=key_value_heads, seq_length=length, use_rotary_position_embeddings=True,
        rotary_position_embeddings_theta=500000.0, normalization="rmsnorm", swiglu=True, disable_bias_linear=True,
        untie_embeddings_and_output_weights=True, attention_backend=backend,
    ).resolved()  # fmt: skip
    execution = Execution(fpdt=True, chunk_size=chunk, offloading=offloading)
    model = build_model(config, 128, ParallelState(), execution, torch.bfloat16, "cuda")
    layer, store = model.layers[0], model.execution.store
    positions = torch.arange(length).expand(1, length).contiguous().pin_memory()
    x, dy = (store.empty((length, 1, 4096), torch.bfloat16) for _ in range(2))
    for tensor in (x, dy):
        for part in tensor.split(chunk):
            part.copy_(torch.randn(part.shape, device="cuda", dtype=torch.bfloat16))
    x.requires_grad_()
    times = []
    for repeat in range(repeats + 1):
        for parameter in layer.parameters():
            parameter.grad = None
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        y, forward = timed(layer, x, positions)
        _, backward = timed(y.backward, dy)
        del y
        peak = torch.cuda.max_memory_allocated() - base
        if repeat:
            times.append((forward, backward))
    flops = forward_flops(config, 128, length)
    model_flops = 3 * (flops.token_wise + flops.attention)
    forward, backward = (statistics.median(t) for t in zip(*times, strict=True))
    rate = model_flops / (forward + backward) / 1e12
    return {
        "tokens": length, "chunk": chunk, "key_value_heads": key_value_heads,
        "backend": model.execution.stream.attention.name,
        "offloading": offloading, "forward_seconds": forward, "backward_seconds": backward,
        "spread": max(f + b for f, b in times) / min(f + b for f, b in times) - 1,
        "model_tflops": rate, "times_matmul": rate / product, "peak_gib_above_weights": peak / 2**30,
        "host_bytes_used": store.pool.peak_used_bytes, "host_bytes_allocated": store.pool.allocated_bytes,
    }  # fmt: skip


def format_row(row: dict[str, Any]) -> str:
    return (
        f"{row['tokens']:>8} tokens, chunk {row['chunk']:>6}, {row['backend']:>11}, "
        f"offloading {row['offloading']!s:>5}: "
        f"forward {row['forward_seconds']:.3f} s, backward {row['backward_seconds']:.3f} s, "
        f"{row['model_tflops']:.0f} model TFLOP/s = {row['times_matmul']:.3f} x matmul (spread {row['spread']:.1%}), "
        f"peak {row['peak_gib_above_weights']:.2f} GiB above weights"
    )


if __name__ == "__main__":
    sys.exit(main())
