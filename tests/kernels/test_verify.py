"""Acceptance ratios and verification against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from free_kernels import Acceptance, StepTable, Verification, acceptance, acceptance_from_means, normal, uniform, verify
from free_kernels.posterior.reference import effective_window
from tests.kernels import helpers
from tests.kernels.helpers import LAYOUTS, SEEDS, assert_accurate, laid_out, on, table

CPU = torch.device("cpu")
HALVES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Window:
    """Arguments of one verification, on the CPU."""

    states: torch.Tensor
    target: torch.Tensor
    draft: torch.Tensor
    seed: torch.Tensor
    step: torch.Tensor
    length: torch.Tensor
    process: StepTable
    unconditional: torch.Tensor | None = None
    scale: float = 1.0
    noise: torch.Tensor | None = None
    uniforms: torch.Tensor | None = None
    tau: torch.Tensor | None = None
    previous_x0: torch.Tensor | None = None

    def verify(
        self, impl: str, device: torch.device = CPU, layout: str = "contiguous", dtype: torch.dtype = torch.float32
    ) -> Verification:
        def moved(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else laid_out(values.to(device), layout)

        return verify(
            laid_out(self.states.to(device, dtype), layout),
            moved(self.target),
            moved(self.draft),
            self.seed.to(device),
            self.step.to(device),
            self.length.to(device),
            on(device, self.process),
            unconditional_output=moved(self.unconditional),
            guidance_scale=self.scale,
            noise=moved(self.noise),
            uniforms=moved(self.uniforms),
            tau=moved(self.tau),
            previous_x0=None if self.previous_x0 is None else moved(self.previous_x0[:, None])[:, 0],
            impl=impl,
        )

    def check(self, device: torch.device, layout: str = "contiguous") -> Verification:
        """Triton against the reference; returns Triton's, on the CPU."""
        got = self.verify("triton", device, layout)
        assert_accurate(got, self.verify("reference"), self.verify("reference", dtype=torch.float64))
        assert got.next_state.dtype == torch.float32
        return Verification(*(values.cpu() for values in got))


def make_window(
    batch: int = 3,
    window: int = 4,
    numel: int = 37,
    gap: float = 0.3,
    dtype: torch.dtype = torch.float32,
    guided: bool = False,
    clip: bool = False,
    steps: int = 20,
    seed: int = 0,
    memory: bool = False,
) -> Window:
    """A draft that differs from the target by ``gap`` standard deviations of a step, all together."""
    process = table(steps, clip, memory)
    first = torch.arange(batch) * 5 % steps
    states, target = (helpers.normal(batch, window, numel, seed=seed + i) for i in (1, 2))
    target = target.to(dtype)
    unconditional = helpers.normal(batch, window, numel, seed=seed + 3).to(dtype) if guided else None
    scale = 1.5 if guided else 1.0
    combined = target.float() if unconditional is None else unconditional + scale * (target.float() - unconditional)
    at = (first[:, None] + torch.arange(window)).clamp(max=steps - 1)
    previous_x0 = helpers.normal(batch, numel, seed=seed + 5) if memory else None
    if previous_x0 is not None:
        combined, _ = effective_window(states, combined, previous_x0, at, process)
    std = (process.std / process.model_coef)[at].unsqueeze(-1)
    direction = helpers.normal(batch, window, numel, seed=seed + 4)
    draft = combined + gap * std * direction / direction.norm(dim=-1, keepdim=True)
    return Window(
        states,
        target,
        draft[:, : window - 1],
        SEEDS.repeat(-(-batch // len(SEEDS)))[:batch],
        first,
        (steps - first).clamp(max=window),
        process,
        unconditional,
        scale,
        previous_x0=previous_x0,
    )


def uniformly(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_verify(device: torch.device, dtype: torch.dtype, clip: bool) -> None:
    """Guided, an odd number of elements, a window that ends with the process."""
    make_window(batch=4, dtype=dtype, guided=True, clip=clip).check(device)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_verify_of_second_order(device: torch.device, dtype: torch.dtype, guided: bool) -> None:
    """Rejected at the first column, later, and not at all: each takes its x0 from another place."""
    window = make_window(6, 4, gap=0.0, dtype=dtype, guided=guided, memory=True)
    window.draft[0, 0] += 1e3
    window.draft[1, 1] += 1e3
    window = replace(window, length=torch.tensor([4, 4, 1, 0, 3, 4]))
    got = window.check(device)
    assert got.advance.tolist() == [1, 2, 1, 0, 3, 4]
    assert torch.equal(got.x0[3], window.previous_x0[3])
    shown = replace(window, states=window.states.clone())
    for row, advance in enumerate(got.advance.tolist()):  # nothing beyond the settled steps is looked at
        shown.states[row, max(advance, 1) :] = torch.nan
    again = shown.verify("triton", device)
    assert torch.equal(again.x0.cpu(), got.x0)
    assert torch.equal(again.next_state.cpu(), got.next_state)


@pytest.mark.parametrize(("window", "numel"), [(1, 37), (2, 1), (3, 1025)])
def test_verify_of_second_order_of_any_size(device: torch.device, window: int, numel: int) -> None:
    made = make_window(2, window, numel, memory=True)
    made.check(device)
    if window > 1:
        check_acceptance(device, made)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_reads_any_strides(device: torch.device, layout: str) -> None:
    replace(make_window(numel=21, guided=True, memory=True), tau=uniformly(3, 4)).check(device, layout)
    window = make_window(numel=21, guided=True)
    window = replace(window, noise=helpers.normal(*window.states.shape, seed=9), uniforms=uniformly(3, 5))
    window = replace(window, tau=uniformly(3, 4, seed=1))
    window.check(device, layout)


@pytest.mark.parametrize(("window", "numel"), [(1, 37), (2, 1), (3, 1025), (5, 256)])
@pytest.mark.parametrize("relaxed", [False, True])
def test_verify_of_any_size(device: torch.device, window: int, numel: int, relaxed: bool) -> None:
    replace(make_window(2, window, numel), tau=uniformly(2, window - 1) if relaxed else None).check(device)


@pytest.mark.parametrize("window", [1, 3])
def test_process_of_one_step(device: torch.device, window: int) -> None:
    result = make_window(2, window, 6, steps=1).verify("triton", device)
    expected = make_window(2, window, 6, steps=1).verify("reference")
    assert result.advance.tolist() == [1, 1]
    assert not result.rejected.any()
    torch.testing.assert_close(result.next_state.cpu(), expected.next_state)


def test_chunks_of_several_blocks_and_windows_of_several_tiles(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How a large D and a large W are split, at a small size; the last block of the last chunk lies beyond D."""
    from free_kernels import launch
    from free_kernels.verify import kernel

    monkeypatch.setattr(launch, "MAX_CHUNKS", 3)
    monkeypatch.setattr(kernel, "MAX_SUMS", 8)
    assert launch.chunks_of(3600) == (3, 2)
    window = make_window(1, 6, 3600, gap=0.5)
    got = window.check(device)
    assert got.advance.item() > 2
    assert replace(window, tau=torch.tensor([[1.0, 1.0, torch.nan, 1.0, 1.0]])).check(device).advance.item() == 3
    assert replace(window, tau=torch.zeros(1, 5)).check(device).advance.item() == 6


def test_all_accepted(device: torch.device) -> None:
    """A draft that equals the target is never rejected, whatever u, and the last state takes an exact step."""
    window = make_window(gap=0.0)
    got = window.check(device)
    assert torch.equal(got.advance, window.length)
    assert not got.rejected.any()
    assert (got.squared_norm == 0).all()
    assert (got.log_ratio == 0).all()


def test_all_rejected(device: torch.device) -> None:
    window = make_window(gap=60.0)
    got = window.check(device)
    assert got.advance.tolist() == [1, 1, 1]
    assert got.rejected.all()


def test_reflection_keeps_the_distance_to_the_mean(device: torch.device) -> None:
    window = make_window(gap=60.0)
    got = window.verify("triton", device).next_state.cpu().double()
    k, process = window.step, window.process
    coefs = [getattr(process, name)[k].double()[:, None] for name in ("state_coef", "model_coef", "std")]
    mean = coefs[0] * window.states[:, 0] + coefs[1] * window.target[:, 0]
    noise = normal(window.seed, k, 37, impl="reference").double()
    reflected = (got - mean) / coefs[2]
    torch.testing.assert_close(reflected.norm(dim=-1), noise.norm(dim=-1), rtol=1e-4, atol=0)
    assert ((reflected - noise).norm(dim=-1) > 1e-2).all()


def test_finished_and_short_samples(device: torch.device) -> None:
    """Length 0 keeps the state to the bit, though its outputs are NaN; length 1 takes an exact step and tests nothing."""
    window = replace(make_window(4, gap=60.0), length=torch.tensor([0, 1, 2, 0]))
    window.target[0], window.draft[0], window.draft[3] = torch.nan, torch.nan, torch.inf
    got = window.check(device)
    assert got.advance.tolist() == [0, 1, 1, 0]
    assert got.rejected.tolist() == [False, False, True, False]
    assert torch.equal(got.next_state[[0, 3]], window.states[[0, 3], 0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_rejects(device: torch.device, value: float) -> None:
    """A draft that is not finite is replaced by an exact draw; a target that is not finite shows in the state."""
    window = make_window(2, gap=0.0)
    window.draft[0, 1, 5] = value
    window.target[1, 1, 5] = torch.nan
    got = window.check(device)
    assert got.advance.tolist() == [2, 2]
    assert got.rejected.all()
    assert torch.isfinite(got.next_state[0]).all()
    assert got.next_state[1].isnan().sum() == 1


@pytest.mark.parametrize("dtype", HALVES)
def test_tau_of_one_is_exact_to_the_bit(device: torch.device, dtype: torch.dtype) -> None:
    window = make_window(6, gap=1.0)
    relaxed = replace(window, tau=torch.ones(6, 4, dtype=dtype))
    exact = window.verify("triton", device)
    for mine, theirs in zip(relaxed.verify("triton", device), exact, strict=True):
        assert torch.equal(mine, theirs)
    assert 0 < exact.rejected.sum() < 6


def test_tau_of_zero_accepts_what_is_finite(device: torch.device) -> None:
    """Not NaN, not a draft infinitely far; and a tau that is NaN rejects even an exact draft."""
    window = replace(make_window(5, gap=60.0), step=torch.ones(5, dtype=torch.int64), length=torch.full((5,), 4))
    for row, value in ((1, torch.nan), (2, torch.inf), (3, -torch.inf)):
        window.draft[row, 1, 5] = value
    window.draft[4] = window.target[4, :3]
    tau = torch.zeros(5, 3)
    tau[4, 1] = torch.nan
    got = replace(window, tau=tau).check(device)
    assert got.rejected.tolist() == [False, True, True, True, True]
    assert got.advance.tolist() == [4, 2, 2, 2, 2]
    assert torch.isfinite(got.next_state).all()


@pytest.mark.parametrize("relaxed", [False, True])
def test_decisions_equal_the_reference(device: torch.device, relaxed: bool) -> None:
    """To the bit, but where u and the ratio agree to float32's accuracy."""
    window = make_window(48, 3, 9, gap=1.0)
    tau = uniformly(48, 3)
    window = replace(window, seed=torch.arange(48) + 2**40, tau=tau if relaxed else None)
    got = Verification(*(values.cpu() for values in window.verify("triton", device)))
    exact = window.verify("reference", dtype=torch.float64)
    steps = (window.step[:, None] + torch.arange(2)).clamp(max=19)
    tempered = tau[:, :2] * exact.log_ratio if relaxed else exact.log_ratio
    margin = (uniform(window.seed[:, None], steps, dtype=torch.float64).log() - tempered).abs()
    clear = (margin > 1e-4).all(-1)
    assert clear.sum() > 44
    assert torch.equal(got.advance[clear], exact.advance[clear])
    assert torch.equal(got.rejected[clear], exact.rejected[clear])
    assert set(got.advance.tolist()) == {1, 2, 3}
    assert (5 if relaxed else 10) < got.rejected.sum() < 40
    torch.testing.assert_close(got.log_ratio, exact.log_ratio.float(), rtol=1e-4, atol=1e-4)


def test_given_noise_and_uniforms_change_nothing_to_the_bit(device: torch.device) -> None:
    window = make_window(gap=1.0)
    columns = torch.arange(4)
    steps = (window.step[:, None] + columns).clamp(max=19).to(device)
    seed = window.seed[:, None].to(device)
    given = replace(
        window, noise=normal(seed, steps, 37, impl="triton").cpu(), uniforms=uniform(seed, steps, impl="triton").cpu()
    )
    for made, read in zip(window.verify("triton", device), given.verify("triton", device), strict=True):
        assert torch.equal(made, read)


def test_a_sample_does_not_depend_on_its_batch(device: torch.device) -> None:
    window = make_window(5, gap=1.0)
    together = window.verify("triton", device)
    for row in range(5):
        alone = Window(
            *(getattr(window, name)[row : row + 1] for name in ("states", "target", "draft", "seed", "step", "length")),
            window.process,
        ).verify("triton", device)
        for mine, theirs in zip(alone, together, strict=True):
            assert torch.equal(mine[0], theirs[row])


def test_out_of_range_steps_and_lengths_touch_no_foreign_memory(device: torch.device) -> None:
    """Steps beyond the table are its last, as in the reference; lengths beyond the window are the window's."""
    window = replace(make_window(2, gap=0.0), step=torch.tensor([10**6, 2]))
    window.check(device)
    beyond = replace(window, step=torch.tensor([-(10**6), 2]), length=torch.tensor([-7, 99]))
    got = beyond.verify("triton", device)
    assert got.advance.tolist() == [0, 4]
    assert torch.isfinite(got.next_state).all()


def check_acceptance(device: torch.device, window: Window, layout: str = "contiguous") -> None:
    def call(impl: str, to: torch.device, dtype: torch.dtype = torch.float32) -> Acceptance:
        def moved(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else laid_out(values[:, : window.draft.shape[1]].to(to), layout)

        states = moved(window.states)
        assert states is not None
        return acceptance(
            states.to(dtype),
            moved(window.target),
            moved(window.draft),
            window.seed.to(to),
            window.step.to(to),
            on(to, window.process),
            unconditional_output=moved(window.unconditional),
            guidance_scale=window.scale,
            noise=moved(window.noise),
            previous_x0=None if window.previous_x0 is None else window.previous_x0.to(to),
            impl=impl,
        )

    assert_accurate(call("triton", device), call("reference", CPU), call("reference", CPU, torch.float64))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_acceptance(device: torch.device, dtype: torch.dtype, clip: bool) -> None:
    check_acceptance(device, make_window(dtype=dtype, guided=True, clip=clip))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_acceptance_reads_any_strides(device: torch.device, layout: str) -> None:
    window = make_window(numel=21, guided=True, clip=True)
    check_acceptance(device, replace(window, noise=helpers.normal(*window.states.shape, seed=9)), layout)


@pytest.mark.parametrize("numel", [1, 1025])
def test_acceptance_of_any_size(device: torch.device, numel: int) -> None:
    check_acceptance(device, make_window(2, 3, numel))


def test_acceptance_of_a_step_without_noise_is_not_a_number(device: torch.device) -> None:
    window = make_window(1, 3, 9)
    got = acceptance(
        window.states[:, :2].to(device),
        window.target[:, :2].to(device),
        window.draft.to(device) + 1.0,
        window.seed.to(device),
        torch.tensor([18], device=device),
        on(device, window.process),
        impl="triton",
    )
    assert got.log_ratio.isfinite().tolist() == [[True, False]]
    assert not (got.log_ratio[0, 1] > -torch.inf)


@pytest.mark.parametrize(
    ("dtype", "layout"), [*((torch.float32, layout) for layout in LAYOUTS), (torch.bfloat16, "contiguous")]
)
def test_acceptance_from_means(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    proposal, target, draft = (helpers.normal(5, 1030, seed=i).to(dtype) for i in range(3))
    std = torch.tensor([0.5, 1.0, 3.0, 10.0, 0.01])

    def call(impl: str, to: torch.device, exact: bool = False) -> Acceptance:
        values = [laid_out(tensor.to(to), layout) for tensor in (proposal, target, draft)]
        return acceptance_from_means(values[0].double() if exact else values[0], *values[1:], std.to(to), impl=impl)

    assert_accurate(call("triton", device), call("reference", CPU), call("reference", CPU, exact=True))


def test_acceptance_from_means_without_noise(device: torch.device) -> None:
    rows = [helpers.normal(2, 40, seed=i).to(device) for i in range(3)]
    got = acceptance_from_means(*rows, torch.tensor([0.0, 1.0], device=device), impl="triton")
    assert got.log_ratio.isnan().tolist() == [True, False]
