"""Which implementation runs, and what survives a compiler."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import free_kernels
from free_kernels import StepTable, dispatch
from free_kernels.dispatch import resolve
from tests.kernels import helpers
from tests.kernels.helpers import on, table

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_follows_the_device() -> None:
    pytest.importorskip("triton")
    assert resolve("auto", CPU) == "reference"
    assert resolve("auto", torch.device("meta")) == "reference"
    assert resolve("auto", CUDA) == "triton"
    assert resolve("reference", CUDA) == "reference"


def test_auto_without_triton_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton_installed", lambda: False)
    assert resolve("auto", CUDA) == "reference"
    with pytest.raises(RuntimeError, match="triton is not installed"):
        resolve("triton", CUDA)


def test_float64_and_gradients_go_to_the_reference() -> None:
    pytest.importorskip("triton")
    double, tracked = torch.zeros(2, dtype=torch.float64), torch.zeros(2, requires_grad=True)
    assert resolve("auto", CUDA, state=double) == "reference"
    assert resolve("auto", CUDA, dtype=torch.float64) == "reference"
    assert resolve("auto", CUDA, state=torch.zeros(2), draft_output=tracked) == "reference"
    with torch.no_grad():
        assert resolve("auto", CUDA, draft_output=tracked) == "triton"
    with pytest.raises(ValueError, match=r"state is torch\.float64"):
        resolve("triton", CUDA, state=double)
    with pytest.raises(ValueError, match="draft_output requires a gradient"):
        resolve("triton", CUDA, draft_output=tracked)


def test_triton_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    seed = torch.tensor([1])
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        free_kernels.normal(seed, seed, 4, impl="triton")
    with pytest.raises(RuntimeError, match="these are on meta"):
        free_kernels.normal(seed.to("meta"), seed.to("meta"), 4, impl="triton")
    with pytest.raises(ValueError, match=r"impl is 'cuda'; known are 'auto', 'triton', 'reference'"):
        free_kernels.normal(seed, seed, 4, impl="cuda")


def test_interpreter_chosen_too_late_is_said() -> None:
    code = (
        "import os, torch, triton, free_kernels\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "seed = torch.tensor([1])\n"
        "free_kernels.normal(seed, seed, 4, impl='triton')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "RuntimeError" in done.stderr
    assert "triton was imported before TRITON_INTERPRET=1 was set" in done.stderr


def all_operations(
    states: torch.Tensor, outputs: torch.Tensor, seed: torch.Tensor, step: torch.Tensor, process: StepTable, impl: str
) -> Any:
    """Every operation once, each on the results of another."""
    length = torch.full_like(step, states.shape[1])
    half = {"unconditional_output": outputs * 0.9, "guidance_scale": 1.5, "impl": impl}
    window = (states[:, 0], seed, step, 3, states, outputs, step, length, process)
    plain = free_kernels.propose(*window, impl=impl)
    proposal = free_kernels.propose(*window, correction=outputs * 0.1, impl=impl)
    drafted = (proposal.states, outputs, proposal.draft_output, seed, step, length, process)
    fractions = states[..., 0].abs().clamp(max=1)  # exact, whoever computes it
    exact = free_kernels.verify(*drafted, **half)
    verified = free_kernels.verify(*drafted, tau=fractions, **half)
    state = free_kernels.posterior(verified.next_state, outputs[:, 0], seed, step, process, impl=impl)
    ratios = free_kernels.acceptance(states, outputs, outputs + 0.01, seed, step, process, **half)
    general = free_kernels.acceptance_from_means(state, state + 1, state - 1, state[:, 0].abs() + 1, impl=impl)
    reflected = free_kernels.householder(state, state + 1, general.inner, general.squared_norm, impl=impl)
    second = process._replace(memory_gain=process.std)
    remembered = free_kernels.verify(*drafted[:-1], second, previous_x0=state, **half)
    ratios_of_second = free_kernels.acceptance(states, outputs, outputs, seed, step, second, previous_x0=state, **half)
    drafts_of_second = free_kernels.propose(*window[:-1], second, previous_x0=state, impl=impl)
    steps_of_second = free_kernels.posterior_with_memory(state, outputs[:, 0], state * 0.5, seed, step, second, impl=impl)
    words = free_kernels.philox(seed, step, 2, impl=impl)
    noise, test = free_kernels.normal(seed, step, 5, impl=impl), free_kernels.uniform(seed, step, impl=impl)
    covered = free_kernels.span(step, torch.full_like(process.std, len(process.std) - 1, dtype=torch.int64), 3, impl=impl)
    finite = free_kernels.finite(outputs, length, state, unconditional_output=outputs, impl=impl)
    sums = torch.ones(len(step), 3, dtype=torch.float64, device=step.device)
    tau = free_kernels.relaxed_tau(fractions[:, 1:], 1.0, squared_norm=exact.squared_norm, spent=sums, budget=1.1, impl=impl)
    tests = (exact.squared_norm, exact.log_ratio, tau, exact.advance, exact.rejected, seed, step, sums, sums[:, :2])
    cost = free_kernels.relaxed_cost(*tests, impl=impl)
    cost_of_read = free_kernels.relaxed_cost(*tests, uniforms=fractions, impl=impl)
    relaxed = (*covered, *finite, tau, *cost, *cost_of_read)
    of_second = (*remembered, *ratios_of_second, *drafts_of_second, *steps_of_second)
    return (
        *plain,
        *proposal,
        *exact,
        *verified,
        state,
        *ratios,
        *general,
        reflected,
        words,
        noise,
        test,
        *of_second,
        *relaxed,
    )


def arguments(device: torch.device) -> tuple[Any, ...]:
    states, outputs = helpers.normal(2, 3, 9), helpers.normal(2, 3, 9, seed=1)
    tensors = (values.to(device) for values in (states, outputs, torch.tensor([1, 2]), torch.tensor([0, 5])))
    return (*tensors, on(device, table()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_operations_survive_a_compiler(device: torch.device, backend: str) -> None:
    if device.type == "cpu" and backend == "inductor":
        pytest.importorskip("torch._inductor.cpp_builder").get_cpp_compiler()
    compiled = torch.compile(all_operations, fullgraph=True, backend=backend)
    got, expected = compiled(*arguments(device), "triton"), all_operations(*arguments(device), "triton")
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_fake_tensors_have_the_results_shapes(device: torch.device) -> None:
    real = all_operations(*arguments(device), "triton")
    *tensors, process = arguments(device)
    with FakeTensorMode() as mode:
        columns = [mode.from_tensor(column) for column in process.columns]
        fake = all_operations(*map(mode.from_tensor, tensors), StepTable(*columns, process.clip_range), "triton")
    assert [(values.shape, values.dtype, values.device) for values in fake] == [
        (values.shape, values.dtype, values.device) for values in real
    ]


def test_registered_operations_keep_their_promises(device: torch.device) -> None:
    """torch's own check of a custom operation: schema, aliasing, fake results."""
    from free_kernels.verify import kernel
    from free_kernels.verify.kernel import mean_columns

    states, outputs, seed, step, process = arguments(device)
    columns = list(mean_columns(process))
    for tau, previous_x0 in ((None, None), (states[..., 0].sigmoid(), None), (None, states[:, 0])):
        torch.library.opcheck(
            kernel._verify_op,
            (
                states,
                outputs,
                outputs[:, 1:],
                seed,
                step,
                step + 1,
                columns,
                None,
                outputs,
                1.5,
                None,
                None,
                tau,
                previous_x0,
            ),
            test_utils=("test_schema", "test_faketensor"),
        )
    from free_kernels.tally import kernel as tally

    progress = torch.zeros(4, 3, dtype=torch.int64, device=device)
    by_step = torch.zeros(9, 3, dtype=torch.float64, device=device)
    torch.library.opcheck(
        tally._tally_op,
        (progress, by_step, step % 3, step, step, step, seed > 1, states[:, :2, 0].contiguous(), step, seed > 0),
        test_utils=("test_schema", "test_faketensor"),
    )
