"""Compiles every kernel for every GPU architecture at hand, without a GPU: ``python -m free_kernels.compile_check``.

The launchers are run on CPU tensors with the launch itself replaced by a note of its arguments, so what is compiled is what
would be launched. A kernel that spills registers or needs a stack fails the check. Prints a table; exits with 1 on failure.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from free_kernels import HOLD_DRAFTS, Patches, Scales, StepTable

ARCHITECTURES = (80, 89, 90, 100)
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
# one D for each block size that the launchers choose, one that splits a chunk into several blocks, one that nothing divides
_TINY, _SMALL, _LARGE, _SEVERAL, _ODD = 64, 4096, 2**15, 2**17, 4001


@dataclass(frozen=True)
class Build:
    """One kernel as it would be launched."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    """Positions of the arguments that 16 divides."""
    options: tuple[tuple[str, Any], ...]
    label: str = field(compare=False)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs."""

    registers: int
    stack: int
    local: int
    shared: int
    spills: int
    instructions: int

    @property
    def passes(self) -> bool:
        return self.stack == self.local == self.spills == 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, 90 for sm_90")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it", file=sys.stderr)
        return 1
    builds = [build for build in collect() if not chosen.kernel or chosen.kernel in build.kernel]
    if not builds:
        print(f"no kernel's name contains {chosen.kernel!r}", file=sys.stderr)
        return 1

    begin, failures = time.perf_counter(), 0
    tasks = list(itertools.product(builds, chosen.arch))
    print(f"{'kernel':34} {'variant':66} {'arch':7} {'regs':>5} {'stack':>5} {'spills':>6} {'shared':>6} {'instr':>6}")
    # processes are started afresh: a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(chosen.jobs, mp_context=get_context("spawn")) as pool:
        for (build, arch), result in zip(tasks, pool.map(_compile_task, tasks, chunksize=4), strict=True):
            name = f"{build.kernel:34} {build.label:66} sm_{arch:<4}"
            if isinstance(result, str):
                failures += 1
                print(f"{name} FAILED: {result}")
                continue
            failures += not result.passes
            print(
                f"{name} {result.registers:5} {result.stack + result.local:5} {result.spills:6} {result.shared:6} "
                f"{result.instructions:6}{'' if result.passes else '  FAILED: stack or spills'}"
            )
    print(f"{len(tasks)} compilations in {time.perf_counter() - begin:.0f} s, {failures} failed")
    return 1 if failures else 0


def collect() -> list[Build]:
    """Every kernel in every variant that is checked, each once."""
    from triton.runtime import JITFunction

    builds: dict[Build, None] = {}
    launches = _launches()
    label = next(launches)

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        builds.setdefault(_describe(kernel, arguments, options, label))

    with mock.patch.object(JITFunction, "run", note):
        while label:
            label = next(launches, "")
    return list(builds)


def _describe(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], label: str) -> Build:
    """The launch as Triton's own specialisation would see it."""
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    named |= {name: options.pop(name) for name in list(options) if name in kernel.arg_names}
    signature, constants, aligned = {}, {}, []
    for position, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            # the allocator of a device aligns to more than this; a CPU tensor's own address says nothing
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(position)
        elif isinstance(value, float):
            signature[parameter.name] = parameter.annotation_type or "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(position)
    return Build(
        kernel.fn.__module__,
        kernel.fn.__name__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(aligned),
        tuple(options.items()),
        label,
    )


def _launches() -> Iterator[str]:
    """Yields what the launches that follow are called, then makes them."""
    philox = import_module("free_kernels.philox.kernel")
    posterior = import_module("free_kernels.posterior.kernel")
    householder = import_module("free_kernels.householder.kernel")
    acceptance = import_module("free_kernels.acceptance.kernel")
    propose = import_module("free_kernels.propose.kernel")
    verify = import_module("free_kernels.verify.kernel")
    span = import_module("free_kernels.span.kernel")
    finite = import_module("free_kernels.finite.kernel")
    tally = import_module("free_kernels.tally.kernel")
    relaxation = import_module("free_kernels.relaxation.kernel")

    index = torch.zeros(2, dtype=torch.int64)
    column = torch.ones(50)
    plain = StepTable(column, column, column, column, column, column, column)
    yield "integers"
    philox.philox(index, index, 1024, 0)
    for dtype in _OUTPUTS:
        yield f"{_name(dtype)} out"
        philox.uniform(index, index, 1, dtype)
        philox.normal(index, index, _SMALL, 0, dtype)
    yield f"float32 out, D={_LARGE}"
    philox.normal(index, index, _LARGE, 0, torch.float32)

    for numel in (_TINY, _SMALL, _LARGE, _ODD):
        yield f"float32, D={numel}"
        rows, sums = torch.empty(2, numel), torch.empty(2)
        householder.householder(rows, rows, sums, sums)
        acceptance.acceptance_from_means(rows, rows, rows, sums)

    flag = index > 0
    for width in (1, 8, 65, 257):
        yield f"W={width}"
        column_sums, sums = torch.zeros(2, width - 1), torch.zeros(50, 3, dtype=torch.float64)
        span.span(index, index, width)
        for batch in (2, 512):
            each, flags = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.bool)
            squares = torch.zeros(batch, width - 1)
            tally.tally(torch.zeros(4, batch).long(), sums, each, each, each, each, flags, squares, each, flags)
        tests = (column_sums, column_sums, column_sums, index, flag, index, index)
        for uniforms in (None, column_sums):
            relaxation.relaxed_cost(*tests, sums[:2], sums[:2, :2], uniforms)
        for uncertainty in (column_sums, column_sums.double()):
            relaxation.relaxed_tau(uncertainty, 1.5, None, None, None)
            relaxation.relaxed_tau(uncertainty, 1.5, column_sums, sums[:2], 0.5)

    for dtype, clips, cut in _patches():
        yield ", ".join((_name(dtype), "{} groups, patches {} by {} by {}".format(*cut), *["clipped"] * clips))
        _launch_gains(dtype, plain._replace(clip_range=1.0 if clips else None), cut)

    for variant in _variants():
        yield variant.label
        table = plain._replace(clip_range=1.0 if variant.clips else None)
        states = torch.empty(2, variant.window, variant.numel)
        output = torch.empty(states.shape, dtype=variant.dtype)
        half, scale = (output, 1.5) if variant.guided else (None, 1.0)
        tau = states[:, :, 0].contiguous() if variant.relaxed else None
        noise, uniforms = (states, states[:, 1:, 0].contiguous()) if variant.stored else (None, None)
        x0 = states[:, 0] if variant.remembers else None
        table = table._replace(memory_gain=column if variant.remembers else None)
        verify.verify(states, output, states[:, 1:], index, index, index, table, half, scale, noise, uniforms, tau, x0)
        finite.finite(output, index, states[:, 0], half)
        if variant.window > 1:
            acceptance.acceptance(states, output, states[:, 1:], index, index, table, half, scale, noise, x0)
        for draft in HOLD_DRAFTS:
            window = (states[:, 0], index, index, variant.window, states, output, index, index, table)
            propose.propose(*window, draft, half, scale, noise, output if variant.corrected else None, x0)
        first = [None if values is None else values[:, 0] for values in (states, output, half, noise)]
        if x0 is None:
            posterior.posterior(first[0], first[1], index, index, table, first[2], scale, first[3])
        else:
            posterior.posterior_with_memory(first[0], first[1], x0, index, index, table, first[2], scale, first[3])


def _patches() -> Iterator[tuple[torch.dtype, bool, tuple[int, int, int, int]]]:
    """Groups, channels, rows and columns: colours, channels apart, few numbers; every dtype, clipped and not."""
    yield torch.bfloat16, False, (1, 3, 32, 32)
    yield torch.float32, True, (4, 1, 32, 32)
    yield torch.float16, False, (16, 1, 16, 32)
    yield torch.float32, False, (1, 1, 2, 32)
    yield torch.bfloat16, True, (3, 1, 7, 5)


def _launch_gains(dtype: torch.dtype, table: StepTable, cut: tuple[int, int, int, int]) -> None:
    learn_gains = import_module("free_kernels.learn_gains.kernel")
    gain_correction = import_module("free_kernels.gain_correction.kernel")
    groups, channels, rows, columns = cut
    size, window = channels * rows * columns, 8
    numel, bands = 2 * groups * size, min(size, 46 * channels)
    index, states = torch.zeros(2, dtype=torch.int64), torch.empty(2, window, numel)
    patches = Patches(
        torch.empty(channels, channels),
        torch.empty(rows, rows),
        torch.empty(columns, columns),
        torch.empty(channels * rows, channels * rows),
        torch.zeros(numel, dtype=torch.int64),
        False,
        torch.zeros(size, dtype=torch.int64),
        torch.empty(size, bands),
        torch.empty(bands),
        groups,
    )
    scales, sums = Scales(table.std, table.std), torch.empty(2, window, 2, 2, groups * bands)
    known, output = (states, states, sums, index, index), states.to(dtype)
    learn_gains.learn_gains(states, output, index, index, *known, table, scales, patches, (0.5, 0.5), output, 1.5)
    gain_correction.gain_correction(states, index, *known, table, scales, patches, 0.1)
    if table.clip_range is None:
        remembers = table._replace(memory_gain=table.std)
        gain_correction.gain_correction(states, index, *known, remembers, scales, patches, 0.1)


@dataclass(frozen=True)
class _Variant:
    """What the kernels of a window are compiled for."""

    numel: int
    dtype: torch.dtype
    guided: bool = True
    clips: bool = False
    stored: bool = False
    """Whether noise and uniforms are read."""
    corrected: bool = False
    """Whether a correction is added to the drafts."""
    relaxed: bool = False
    """Whether the tests are, by a tau."""
    remembers: bool = False
    """Whether the process is of second order."""
    window: int = 8

    @property
    def label(self) -> str:
        words = [_name(self.dtype), f"D={self.numel}", "guided" * self.guided, "clipped" * self.clips]
        words += ["noise read" * self.stored, "corrected" * self.corrected, "relaxed" * self.relaxed]
        words += ["second order" * self.remembers]
        words += [f"W={self.window}" * (self.window != 8)]
        return ", ".join(filter(None, words))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _variants() -> Iterator[_Variant]:
    """Every dtype, every way to split D, every option."""
    yield _Variant(_TINY, torch.float32, guided=False)
    for dtype in _OUTPUTS:
        yield _Variant(_SMALL, dtype)
    yield _Variant(_LARGE, torch.bfloat16)
    yield _Variant(_SEVERAL, torch.bfloat16, window=64)
    yield _Variant(_ODD, torch.bfloat16, window=1)
    yield _Variant(_ODD, torch.float32, clips=True)
    yield _Variant(_LARGE, torch.float32, clips=True, stored=True)
    for dtype in _OUTPUTS:
        yield _Variant(_SMALL, dtype, corrected=True, relaxed=True)
    yield _Variant(_SEVERAL, torch.bfloat16, relaxed=True, window=64)
    yield _Variant(_ODD, torch.float32, clips=True, corrected=True, relaxed=True)
    yield _Variant(_LARGE, torch.float32, clips=True, stored=True, corrected=True, relaxed=True)
    for dtype in _OUTPUTS:
        yield _Variant(_SMALL, dtype, corrected=True, remembers=True)
    yield _Variant(_ODD, torch.float32, guided=False, remembers=True, window=1)
    yield _Variant(_SEVERAL, torch.bfloat16, remembers=True, window=64)
    yield _Variant(_LARGE, torch.float32, stored=True, corrected=True, relaxed=True, remembers=True)


def _compile_task(task: tuple[Build, int]) -> Usage | str:
    """The kernel's needs, or what went wrong, in one line."""
    try:
        return compile_build(*task)
    except Exception as error:  # whatever a compiler raises is a failed check, and the others still run
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def compile_build(build: Build, arch: int) -> Usage:
    """Compile for ``sm_<arch>`` and read the binary's needs off it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        getattr(import_module(build.module), build.kernel),
        dict(build.signature),
        dict(build.constants),
        {(position,): [["tt.divisibility", 16]] for position in build.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(build.options))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        assembly = subprocess.run(
            [tool, "-res-usage", "-sass", file.name], check=True, capture_output=True, text=True
        ).stdout
    needs = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", assembly))
    operations = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", assembly, re.MULTILINE)
    return Usage(
        int(needs["REG"]),
        int(needs["STACK"]),
        int(needs["LOCAL"]),
        compiled.metadata.shared,
        sum(operation.split(".")[0] in ("STL", "LDL") for operation in operations),
        sum(operation != "NOP" for operation in operations),
    )


if __name__ == "__main__":
    sys.exit(main())
