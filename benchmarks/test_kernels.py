"""Every operation: the Triton kernels, the reference in eager torch, and the reference under torch.compile.

On a GPU also the same work as a captured graph, and the time that the bytes alone would take at the measured bandwidth of a
copy. Without one the smallest shape runs on the CPU, and what was left out is printed at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import free_kernels
from benchmarks.rows import write_row
from benchmarks.timing import captured, copy_bandwidth, median_microseconds
from free import ReverseProcess
from free_kernels import StepTable

SHAPES = ((1, 8, 4096), (8, 8, 16384), (16, 16, 65536), (1, 32, 4096))
ON_CPU = SHAPES[:1]
OPERATIONS = (
    "normal",
    "posterior",
    "householder",
    "acceptance",
    "acceptance_from_means",
    "propose",
    "verify",
    "verify_stored_noise",
)
GUIDANCE = 1.5
STEPS = 250

Call = Callable[[str], Any]


def make(operation: str, shape: tuple[int, int, int], device: torch.device) -> tuple[Call, int]:
    """The operation as a function of ``impl``, and how many bytes it has to move: inputs once, results once.

    bfloat16 network outputs with guidance, as a guided DiT returns them: two halves of one batch.
    """
    batch, window, numel = shape
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    process = ReverseProcess.ddpm(STEPS).table
    table = StepTable(*(column.to(device) for column in process.columns), process.clip_range)
    seed = torch.arange(batch, device=device)
    step = 40 + 3 * torch.arange(batch, device=device)
    length = torch.full_like(step, window)
    states = random(batch, window, numel)
    both = random(2, batch, window, numel).bfloat16()
    guided: dict[str, Any] = {"unconditional_output": both[1], "guidance_scale": GUIDANCE}
    combined = free_kernels.guided(both[0], both[1], GUIDANCE, torch.float32)
    # drafts at a distance at which windows are accepted about half way: |delta| of 0.3
    steps = (step[:, None] + torch.arange(window, device=device)).clamp(max=STEPS - 1)
    apart = random(batch, window, numel)
    draft = combined + 0.3 * (table.std / table.model_coef)[steps][..., None] * apart / apart.norm(dim=-1, keepdim=True)
    draft = draft[:, :-1]

    rows, row = batch * numel, batch * window * numel
    if operation == "normal":
        steps = step[:, None] + torch.arange(window, device=device)
        return lambda impl: free_kernels.normal(seed[:, None], steps, numel, impl=impl), 4 * row
    if operation == "posterior":
        first = {"unconditional_output": both[1, :, 0], "guidance_scale": GUIDANCE}
        return (
            lambda impl: free_kernels.posterior(states[:, 0], both[0, :, 0], seed, step, table, **first, impl=impl),
            (4 + 2 + 2 + 4) * rows,
        )
    if operation == "householder":
        noise, delta = states.flatten(0, 1), apart.flatten(0, 1)
        inner, squared_norm = (noise * delta).sum(-1), delta.square().sum(-1)
        return lambda impl: free_kernels.householder(noise, delta, inner, squared_norm, impl=impl), 12 * row
    if operation == "acceptance":
        return (
            lambda impl: free_kernels.acceptance(states, both[0], combined, seed, step, table, **guided, impl=impl),
            (2 + 2 + 4) * row,
        )
    if operation == "acceptance_from_means":
        proposal, target, drafted = (values.flatten(0, 1) for values in (states, combined, apart))
        std = torch.ones(batch * window, device=device)
        return lambda impl: free_kernels.acceptance_from_means(proposal, target, drafted, std, impl=impl), 12 * row
    if operation == "propose":
        anchored = {"unconditional_anchor_outputs": both[1], "guidance_scale": GUIDANCE}
        return (
            lambda impl: free_kernels.propose(
                states[:, 0], seed, step, window, states, both[0], step, length, table, **anchored, impl=impl
            ),
            4 * rows + (window - 1) * (4 + 2 + 2) * rows + (2 * window - 1) * 4 * rows,
        )
    moved = (window - 1) * (2 + 2 + 4) * rows + (4 + 2 + 2 + 4) * rows
    if operation == "verify_stored_noise":
        # the other way out where philox's arithmetic, not memory, is the limit: read what propose has drawn
        steps = step[:, None] + torch.arange(window, device=device)
        guided["noise"] = free_kernels.normal(seed[:, None], steps, numel)
        moved += 4 * window * rows
    return lambda impl: free_kernels.verify(states, both[0], draft, seed, step, length, table, **guided, impl=impl), moved


@cache
def bandwidth() -> float:
    return copy_bandwidth(torch.device("cuda"))


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
    call, size = make(operation, shape, device)

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
