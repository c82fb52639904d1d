"""Posterior, householder and propose against the reference in float64."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from free_kernels import HOLD_DRAFTS, StepTable, householder, normal, posterior, posterior_with_memory, propose
from tests.kernels import helpers
from tests.kernels.helpers import LAYOUTS, SEEDS, assert_accurate, laid_out, on, table

HALVES = (torch.float32, torch.float16, torch.bfloat16)


def check_posterior(
    device: torch.device,
    process: StepTable,
    state: torch.Tensor,
    output: torch.Tensor,
    step: torch.Tensor,
    unconditional: torch.Tensor | None = None,
    scale: float = 1.0,
    noise: torch.Tensor | None = None,
    layout: str = "contiguous",
) -> None:
    seed = SEEDS[: len(state)]

    def moved(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else laid_out(values.to(device), layout)

    got = posterior(
        moved(state),
        moved(output),
        seed.to(device),
        step.to(device),
        on(device, process),
        unconditional_output=moved(unconditional),
        guidance_scale=scale,
        noise=moved(noise),
        impl="triton",
    )
    expected = [
        posterior(
            values,
            output,
            seed,
            step,
            process,
            unconditional_output=unconditional,
            guidance_scale=scale,
            noise=noise,
            impl="reference",
        )
        for values in (state, state.double())
    ]
    assert_accurate([got], expected[:1], expected[1:])


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_posterior(device: torch.device, dtype: torch.dtype, clip: bool) -> None:
    """Guided, an odd number of elements, steps of all kinds: the first, the exact last, one beyond the table."""
    output, unconditional = (helpers.normal(4, 37, seed=i).to(dtype) for i in (1, 2))
    step = torch.tensor([0, 7, 19, 23])
    check_posterior(device, table(20, clip), helpers.normal(4, 37), output, step, unconditional, 1.5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_posterior_reads_any_strides(device: torch.device, layout: str) -> None:
    values = [helpers.normal(3, 21, seed=i) for i in range(4)]
    step = torch.tensor([2, 3, 4])
    check_posterior(device, table(), values[0], values[1], step, values[2], 2.0, values[3], layout=layout)


@pytest.mark.parametrize("numel", [1, 4, 1025])
def test_posterior_of_any_size(device: torch.device, numel: int) -> None:
    state, output = helpers.normal(1, numel), helpers.normal(1, numel, seed=1)
    check_posterior(device, table(), state, output, torch.tensor([5]))


def test_posterior_of_a_process_of_one_step(device: torch.device) -> None:
    state, output = helpers.normal(2, 6), helpers.normal(2, 6, seed=1)
    check_posterior(device, table(1), state, output, torch.tensor([0, 0]))


def test_posterior_takes_expanded_inputs(device: torch.device) -> None:
    """One row for all samples, by strides of zero: seeds, steps, states and outputs."""
    seed, step = torch.tensor(3, device=device).expand(4), torch.tensor(2, device=device).expand(4)
    state, output = helpers.normal(10).to(device).expand(4, 10), helpers.normal(10, seed=1).to(device).expand(4, 10)
    got = posterior(state, output, seed, step, on(device, table()), impl="triton")
    assert torch.equal(got, got[:1].expand(4, 10))
    expected = posterior(state.cpu(), output.cpu(), seed.cpu(), step.cpu(), table(), impl="reference")
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-4)


def test_posterior_reads_the_noise_it_is_given_to_the_bit(device: torch.device) -> None:
    state, output, seed = helpers.normal(3, 50).to(device), helpers.normal(3, 50, seed=1).to(device), SEEDS[:3].to(device)
    step, process = torch.tensor([0, 5, 9], device=device), on(device, table())
    noise = normal(seed, step, 50, impl="triton")
    made = posterior(state, output, seed, step, process, impl="triton")
    assert torch.equal(made, posterior(state, output, seed, step, process, noise=noise, impl="triton"))
    assert not torch.equal(made, posterior(state, output, seed, step, process, noise=noise + 1, impl="triton"))


def test_posterior_passes_nan_on(device: torch.device) -> None:
    output = helpers.normal(2, 9, seed=1)
    output[1, 3] = torch.nan
    for clip in (False, True):
        check_posterior(device, table(20, clip), helpers.normal(2, 9), output, torch.tensor([3, 4]))


@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
def test_householder(device: torch.device, layout: str) -> None:
    noise, delta = helpers.normal(6, 37), helpers.normal(6, 37, seed=1)
    delta[1] = 0.0
    delta[2, 5] = torch.nan
    delta[3, 5] = torch.inf
    inner, squared_norm = (noise * delta).sum(-1), delta.square().sum(-1)
    inner[4], squared_norm[4] = torch.nan, 2.0
    sums = inner.to(device), squared_norm.to(device)
    got = householder(laid_out(noise.to(device), layout), laid_out(delta.to(device), layout), *sums, impl="triton")
    plain = householder(noise, delta, inner, squared_norm, impl="reference")
    exact = householder(noise.double(), delta, inner, squared_norm, impl="reference")
    assert_accurate([got], [plain], [exact])
    assert torch.equal(got[1:5].cpu(), noise[1:5])  # nothing to reflect at
    assert (got[5].cpu() - noise[5]).abs().max() > 0.01
    torch.testing.assert_close(got[5].cpu().square().sum(), noise[5].square().sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_householder_of_half_precisions(device: torch.device, dtype: torch.dtype) -> None:
    noise, delta = helpers.normal(2, 1030).to(dtype), helpers.normal(2, 1030, seed=1).to(dtype)
    inner, squared_norm = (noise.float() * delta.float()).sum(-1), delta.float().square().sum(-1)
    got = householder(noise.to(device), delta.to(device), inner.to(device), squared_norm.to(device), impl="triton")
    plain = householder(noise, delta, inner, squared_norm, impl="reference")
    exact = householder(noise.double(), delta, inner, squared_norm, impl="reference")
    assert_accurate([got], [plain], [exact])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("numel", [1, 1030])
def test_posterior_of_second_order(device: torch.device, dtype: torch.dtype, numel: int) -> None:
    state, previous, noise = (helpers.normal(4, numel, seed=i) for i in (0, 1, 2))
    output, unconditional = (helpers.normal(4, numel, seed=i).to(dtype) for i in (3, 4))
    step, process = torch.tensor([0, 7, 10, 25]), table(memory=True)

    def call(impl: str, to: torch.device, exact: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        moved = [values.to(to) for values in (state, output, previous, SEEDS[:4], step)]
        return posterior_with_memory(
            moved[0].double() if exact else moved[0],
            *moved[1:],
            on(to, process),
            unconditional_output=unconditional.to(to),
            guidance_scale=1.5,
            noise=noise.to(to),
            impl=impl,
        )

    cpu = torch.device("cpu")
    assert_accurate(call("triton", device), call("reference", cpu), call("reference", cpu, exact=True))


def check_propose(
    device: torch.device,
    process: StepTable,
    numel: int,
    window: int,
    draft: str,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    layout: str = "contiguous",
    stored: bool = False,
    corrected: bool = False,
) -> None:
    """Anchors that end before, at and after the window, one alone, a window that runs beyond the table."""
    batch, anchors = 4, 5
    seed, step = SEEDS[:batch], torch.tensor([0, 7, 9, 18])
    anchor_step, anchor_length = torch.tensor([0, 6, 2, 14]), torch.tensor([1, 5, 5, 3])
    state, states = helpers.normal(batch, numel), helpers.normal(batch, anchors, numel, seed=1)
    outputs, unconditional = (helpers.normal(batch, anchors, numel, seed=i).to(dtype) for i in (2, 3))
    noise = helpers.normal(batch, window, numel, seed=4) if stored else None
    correction = helpers.normal(batch, window + 1, numel, seed=5).to(dtype) if corrected else None
    previous_x0 = helpers.normal(batch, numel, seed=6) if process.memory_gain is not None else None
    # what was not evaluated is not read
    for values in (states, outputs, unconditional):
        for row, length in enumerate(anchor_length.tolist()):
            values[row, length:] = torch.nan

    def call(impl: str, to: torch.device, exact: bool = False) -> tuple[torch.Tensor, ...]:
        def moved(values: torch.Tensor) -> torch.Tensor:
            return laid_out(values.to(to), layout)

        return propose(
            moved(state).double() if exact else moved(state),
            seed.to(to),
            step.to(to),
            window,
            moved(states),
            moved(outputs),
            anchor_step.to(to),
            anchor_length.to(to),
            on(to, process),
            draft=draft,
            unconditional_anchor_outputs=moved(unconditional) if scale != 1.0 else None,
            guidance_scale=scale,
            noise=None if noise is None else moved(noise),
            correction=None if correction is None else moved(correction),
            previous_x0=None if previous_x0 is None else moved(previous_x0[:, None])[:, 0],
            impl=impl,
        )

    cpu = torch.device("cpu")
    got = call("triton", device)
    assert torch.equal(got[0][:, 0].cpu(), state)
    assert_accurate(got, call("reference", cpu), call("reference", cpu, exact=True))


@pytest.mark.parametrize("draft", HOLD_DRAFTS)
@pytest.mark.parametrize(("dtype", "clip"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)])
def test_propose(device: torch.device, draft: str, dtype: torch.dtype, clip: bool) -> None:
    check_propose(device, table(20, clip), 37, 4, draft, dtype, scale=1.5)


@pytest.mark.parametrize("draft", HOLD_DRAFTS)
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_propose_of_second_order(device: torch.device, draft: str, corrected: bool, dtype: torch.dtype) -> None:
    check_propose(device, table(memory=True), 37, 4, draft, dtype, scale=1.5, corrected=corrected)
    check_propose(device, table(memory=True), 5, 1, draft, dtype)


@pytest.mark.parametrize("draft", HOLD_DRAFTS)
@pytest.mark.parametrize(("dtype", "clip"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)])
def test_propose_with_a_correction(device: torch.device, draft: str, dtype: torch.dtype, clip: bool) -> None:
    """In the dtype of the outputs, with more columns than are drafted."""
    check_propose(device, table(20, clip), 37, 4, draft, dtype, scale=1.5, corrected=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_propose_reads_any_strides(device: torch.device, layout: str) -> None:
    check_propose(device, table(), 21, 3, "hold-x0", scale=1.5, layout=layout, stored=True, corrected=True)


@pytest.mark.parametrize(("numel", "window"), [(1, 3), (1025, 2), (9, 1)])
def test_propose_of_any_size(device: torch.device, numel: int, window: int) -> None:
    check_propose(device, table(), numel, window, "hold-x0")


def test_the_bits_of_a_proposal_do_not_depend_on_its_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    state, states, outputs = helpers.normal(2, 1030), helpers.normal(2, 3, 1030, seed=1), helpers.normal(2, 3, 1030, seed=2)
    seed, step = SEEDS[:2].to(device), torch.tensor([0, 4], device=device)
    anchors = (states.to(device), outputs.to(device), step, step + 1)
    results = []
    for block in (256, 1024):
        monkeypatch.setattr(import_module("free_kernels.propose.kernel"), "block_of", lambda numel, block=block: block)
        results.append(propose(state.to(device), seed, step, 3, *anchors, on(device, table()), impl="triton"))
    for small, large in zip(*results, strict=True):
        assert torch.equal(small, large)


def test_propose_ignores_noise_and_correction_for_a_window_of_one(device: torch.device) -> None:
    check_propose(device, table(), 5, 1, "hold-output", stored=True, corrected=True)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("draft", HOLD_DRAFTS)
def test_a_correction_changes_what_it_touches_and_no_more(device: torch.device, draft: str, clip: bool) -> None:
    """Zeros change nothing to the bit; NaN shows in its own draft and in every state after it."""
    process, step = on(device, table(20, clip)), torch.tensor([0, 4], device=device)
    state, anchors = helpers.normal(2, 9).to(device), helpers.normal(2, 2, 9, seed=1).to(device)
    arguments = (state, SEEDS[:2].to(device), step, 4, anchors, anchors, step, torch.full_like(step, 2), process)
    plain = propose(*arguments, draft=draft, impl="triton")
    correction = torch.zeros(2, 3, 9, device=device)
    for mine, theirs in zip(propose(*arguments, draft=draft, correction=correction, impl="triton"), plain, strict=True):
        assert torch.equal(mine, theirs)
    correction[1, 1, 5] = torch.nan
    states, drafted = propose(*arguments, draft=draft, correction=correction, impl="triton")
    assert states.isnan().nonzero().tolist() == [[1, 2, 5], [1, 3, 5]]
    # hold-x0 looks at the state, and so at the NaN again
    assert drafted.isnan().nonzero().tolist() == [[1, 1, 5], [1, 2, 5]][: 2 if draft == "hold-x0" else 1]


@pytest.mark.parametrize("corrected", [False, True])
def test_propose_walks_as_posterior_does(device: torch.device, corrected: bool) -> None:
    """To the bit: a draft that equals the target must leave no difference."""
    process, seed = on(device, table()), SEEDS[:3].to(device)
    step = torch.tensor([0, 4, 9], device=device)
    state, anchors = helpers.normal(3, 30).to(device), helpers.normal(3, 2, 30, seed=1).to(device)
    outputs, length = helpers.normal(3, 2, 30, seed=2).to(device), torch.full((3,), 2, device=device)
    correction = helpers.normal(3, 3, 30, seed=3).to(device) if corrected else None
    states, drafted = propose(
        state, seed, step, 4, anchors, outputs, step, length, process, correction=correction, impl="triton"
    )
    for j in range(3):
        walked = posterior(states[:, j], drafted[:, j], seed, step + j, process, impl="triton")
        assert torch.equal(walked, states[:, j + 1])
