"""What only a GPU can show: no host synchronisation, captured graphs, several devices' worth of care."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import free
from free_kernels import Proposal, StepTable, Verification, propose, verify
from tests.analytic import GaussianTarget
from tests.kernels import helpers
from tests.kernels.helpers import on, table

pytestmark = pytest.mark.gpu

BATCH, WINDOW, NUMEL = 4, 8, 4096
FULL = pytest.mark.parametrize("full", [False, True])
"""With neither or both of the correction and tau."""


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def _no_synchronisation(gpu: torch.device) -> Iterator[None]:
    """Kernels are compiled and loaded outside; from here on a synchronisation raises."""
    yield
    torch.cuda.set_sync_debug_mode("default")


class Loop:
    """Propose and verify on tensors that stay where they are, as a captured graph needs them."""

    def __init__(self, device: torch.device, full: bool = False) -> None:
        self.process: StepTable = on(device, table(50))
        self.state = helpers.normal(BATCH, NUMEL).to(device)
        self.states, self.output, self.unconditional = (
            helpers.normal(BATCH, WINDOW, NUMEL, seed=i).to(device) for i in (1, 2, 3)
        )
        self.output, self.unconditional = self.output.bfloat16(), self.unconditional.bfloat16()
        self.seed = torch.arange(BATCH, device=device)
        self.step = torch.arange(BATCH, device=device) * 3
        self.length = torch.full((BATCH,), WINDOW, device=device)
        self.correction = 0.01 * self.output if full else None
        self.tau = torch.linspace(0, 1, WINDOW, device=device).expand(BATCH, -1) if full else None

    def run(self, impl: str = "auto") -> tuple[Proposal, Verification]:
        guidance = {"guidance_scale": 1.5, "impl": impl}
        proposal = propose(
            self.state,
            self.seed,
            self.step,
            WINDOW,
            self.states,
            self.output,
            self.step,
            self.length,
            self.process,
            unconditional_anchor_outputs=self.unconditional,
            correction=self.correction,
            **guidance,
        )
        verification = verify(
            proposal.states,
            self.output,
            proposal.draft_output,
            self.seed,
            self.step,
            self.length,
            self.process,
            unconditional_output=self.unconditional,
            tau=self.tau,
            **guidance,
        )
        return proposal, verification


@pytest.mark.usefixtures("_no_synchronisation")
@FULL
def test_a_round_never_waits_for_the_device(gpu: torch.device, full: bool) -> None:
    loop = Loop(gpu, full)
    loop.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError):
        loop.length.sum().item()  # the mode does see one
    loop.run()


@FULL
def test_a_captured_graph_follows_seeds_and_steps(gpu: torch.device, full: bool) -> None:
    loop = Loop(gpu, full)
    loop.run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loop.run()
    seen = []
    for seed, step in ((0, 0), (2**41, 0), (2**41, 17)):
        loop.seed.copy_(torch.arange(BATCH) + seed)
        loop.step.copy_(torch.arange(BATCH) * 3 + step)
        graph.replay()
        expected = loop.run()
        for mine, theirs in zip((*captured[0], *captured[1]), (*expected[0], *expected[1]), strict=True):
            assert torch.equal(mine, theirs)
        seen.append(captured[1].next_state.clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_the_same_bits_on_every_run(gpu: torch.device) -> None:
    """No atomics, no order of arrival: 20 runs of a wide window agree."""
    loop = Loop(gpu)
    first = loop.run()[1]
    for _ in range(20):
        for mine, theirs in zip(loop.run()[1], first, strict=True):
            assert torch.equal(mine, theirs)


def test_large_offsets(gpu: torch.device) -> None:
    """A window whose last rows lie beyond 2**31 elements."""
    batch, window, numel = 3, 3, 2**28 - 8
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free GPU memory")
    states = torch.zeros(batch, window, numel, device=gpu, dtype=torch.bfloat16)
    seed, step = torch.arange(batch, device=gpu), torch.arange(batch, device=gpu)
    length, process = torch.full_like(step, window), on(gpu, table(50))
    draft = states[:, 1:]
    got = verify(states, states, draft, seed, step, length, process)
    assert got.advance.tolist() == [window] * batch
    tail = verify(states[2:, :, :64], states[2:, :, :64], draft[2:, :, :64], seed[2:], step[2:], length[2:], process)
    assert torch.equal(got.next_state[2, :64], tail.next_state[0])
    assert got.next_state[2].std() > 0


@pytest.mark.parametrize("guided", [False, True])
def test_the_sampler_equals_the_cpu_reference(gpu: torch.device, guided: bool) -> None:
    target = GaussianTarget.example()

    def run(device: torch.device, impl: str) -> free.SamplingOutput:
        center = torch.linspace(-1, 1, 48).view(8, 6).to(device)
        arguments = {"conditioning": {"center": center}, "guidance_scale": 1.5} if guided else {}
        model = free.as_target(target, null_conditioning={"center": torch.zeros(1, 6)}) if guided else target
        return free.speculative_sample(
            model,
            process=free.ReverseProcess.ddpm(60),
            latents=torch.full((8, 6), 0.5, device=device),
            seed=list(range(8)),
            window=8,
            impl=impl,
            **arguments,
        )

    got, expected = run(gpu, "auto"), run(torch.device("cpu"), "reference")
    # a decision may fall on the other side of a tie: then one sample's rounds differ, not all of them
    same = [mine == theirs for mine, theirs in zip(got.stats.rounds, expected.stats.rounds, strict=True)]
    assert sum(same) >= 7
    close = (got.samples.cpu() - expected.samples).abs().amax(-1) < 1e-3
    assert close.sum() >= 7
