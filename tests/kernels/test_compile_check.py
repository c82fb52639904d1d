"""The compile check, in processes of its own: this one may be the interpreter's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def run(*arguments: str, interpret: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_a_kernel_passes() -> None:
    done = run("-m", "free_kernels.compile_check", "--kernel", "philox", "--arch", "90", "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 compilations" in done.stdout
    assert "0 failed" in done.stdout


def test_spills_fail() -> None:
    code = (
        "from free_kernels.compile_check import Build, compile_build\n"
        "signature = (('values_ptr', '*fp32'), ('out_ptr', '*fp32'), ('BLOCK', 'constexpr'))\n"
        "options = (('num_warps', 1), ('maxnreg', 32), ('enable_fp_fusion', False))\n"
        "build = Build('tests.kernels.probes', 'spilling_kernel', signature, (('BLOCK', 4096),), (0, 1), options, 'probe')\n"
        "usage = compile_build(build, 90)\n"
        "print(usage.passes, usage.stack > 0, usage.spills > 0, usage.registers)\n"
    )
    done = run("-c", code)
    assert done.stdout.split() == ["False", "True", "True", "32"], done.stderr


def test_the_interpreter_is_refused() -> None:
    done = run("-m", "free_kernels.compile_check", "--kernel", "philox", interpret="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET is set" in done.stderr
