"""Every operation: the Triton kernels, the reference in eager torch, and the reference under torch.compile.

On a GPU also the same work as a captured graph, and the time that the bytes alone would take at the measured bandwidth of a
copy. Without one the smallest shape runs on the CPU, and what was left out is printed at the end.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.operations import GUIDANCE, OPERATIONS, Round
from benchmarks.rows import read_rows, write_row
from benchmarks.timing import captured, copy_bandwidth, median_microseconds
from free.evaluation.rows import environment

SHAPES = ((1, 8, 4096), (8, 8, 16384), (16, 16, 65536), (1, 32, 4096))
ON_CPU = SHAPES[:1]


@cache
def bandwidth() -> float:
    return copy_bandwidth(torch.device("cuda"))


@cache
def measured() -> set[tuple[Any, ...]]:
    """The cases that earlier runs have measured on this device at this revision: one that was cut short goes on."""
    here, said = environment(), ("device", "revision", "torch", "triton")
    rows = (row for row in read_rows("kernels") if all(row.get(name) == here[name] for name in said))
    return {(row["operation"], row["implementation"], row["batch"], row["window"], row["numel"]) for row in rows}


# the last one changes least often: what needs no compiler is measured first
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("implementation", ["triton", "eager", "compile"])
def test_kernel(benchmark: Any, operation: str, shape: tuple[int, int, int], implementation: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and implementation == "triton":
        pytest.skip("no GPU: the Triton kernels (the interpreter's time says nothing)")
    if device.type == "cpu" and shape not in ON_CPU:
        pytest.skip(f"no GPU: shape (B, W, D) = {shape}")
    if device.type == "cuda" and (operation, implementation, *shape) in measured():
        pytest.skip("measured already")
    call, size = OPERATIONS[operation](Round(shape, device))

    def eager() -> Any:
        return call("triton" if implementation == "triton" else "reference")

    torch.compiler.reset()
    run = torch.compile(eager, dynamic=False) if implementation == "compile" else eager
    with torch.no_grad():
        try:
            run()
        except torch._dynamo.exc.TorchDynamoException as error:
            # a compiler's own bug is no measurement, and is listed with what was left out
            pytest.skip(f"torch.compile fails on the reference of {operation}: {type(error).__name__}")
        values: dict[str, Any] = {
            "benchmark": "kernel",
            "operation": operation,
            "implementation": implementation,
            "batch": shape[0],
            "window": shape[1],
            "numel": shape[2],
            "output_dtype": "bfloat16",
            "guidance_scale": GUIDANCE,
            "bytes": size,
            "microseconds_median": median_microseconds(run, device),
        }
        if device.type == "cuda":
            values["microseconds_in_a_graph_median"] = median_microseconds(captured(run), device)
            values["copy_bytes_per_second"] = bandwidth()
            values["microseconds_of_the_bytes"] = 1e6 * size / bandwidth()

        def synchronised() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(synchronised, rounds=10, warmup_rounds=1)
    write_row("kernels", values)
    timing = ", ".join(f"{name} {value:.1f}" for name, value in values.items() if name.startswith("microseconds"))
    print(f"\n{operation} {shape} {implementation}: {timing}")
